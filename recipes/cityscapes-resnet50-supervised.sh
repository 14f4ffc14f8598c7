#!/usr/bin/env bash
# Table:  Cityscapes, after BDD100K
# Row:    UPerNet, ImageNet-supervised, all labels
# Paper:  mIoU 78.7
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  cityscapes
# Cost:   about 6.8 H100-hours in all (an estimate, not measured)
# Status: not run
# Note:   optimizer, crops and batch are usual ones
set -euo pipefail
source "$(dirname "$0")/steps.sh"

dreamteacher evaluate --preset cityscapes --student resnet50 --init imagenet \
  --images "cityscapes:$DATA/cityscapes" --workers 16 --out "$RUNS/cityscapes-resnet50-supervised" "$@"

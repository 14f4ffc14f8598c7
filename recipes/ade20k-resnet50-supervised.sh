#!/usr/bin/env bash
# Table:  ADE20K, ResNet-50
# Row:    UPerNet, ImageNet-supervised
# Paper:  mIoU 40.9
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  ade20k
# Cost:   about 14 H100-hours in all (an estimate, not measured)
# Status: not run
# Note:   optimizer, crops and auxiliary head are not stated: MMSegmentation's usual ones
set -euo pipefail
source "$(dirname "$0")/steps.sh"

dreamteacher evaluate --preset ade20k --student resnet50 --init imagenet --images "ade20k:$DATA/ade20k" \
  --workers 16 --out "$RUNS/ade20k-resnet50-supervised" "$@"

#!/usr/bin/env bash
# Table:  COCO, ResNet-50, Mask R-CNN
# Row:    1x, ImageNet-supervised
# Paper:  box AP 38.9, mask AP 35.4
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  coco
# Cost:   about 8.1 H100-hours in all (an estimate, not measured)
# Status: not run
set -euo pipefail
source "$(dirname "$0")/steps.sh"

dreamteacher evaluate --preset coco-1x --student resnet50 --init imagenet --images "coco:$DATA/coco" \
  --workers 16 --out "$RUNS/coco-resnet50-supervised" "$@"

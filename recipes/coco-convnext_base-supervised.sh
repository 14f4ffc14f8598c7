#!/usr/bin/env bash
# Table:  COCO, ConvNeXt-B, Cascade Mask R-CNN
# Row:    1x, ImageNet-supervised
# Paper:  box AP 51.2, mask AP 44.3
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  coco
# Cost:   about 16 H100-hours in all (an estimate, not measured)
# Status: not run
# Note:   only the 12 epochs are stated: the rest is ConvNeXt's own
set -euo pipefail
source "$(dirname "$0")/steps.sh"

dreamteacher evaluate --preset coco-cascade-1x --student convnext_base --init imagenet \
  --images "coco:$DATA/coco" --workers 16 --out "$RUNS/coco-convnext_base-supervised" "$@"

#!/usr/bin/env bash
# Table:  COCO, ConvNeXt-B, Cascade Mask R-CNN
# Row:    1x, ADM
# Paper:  box AP 52.5, mask AP 45.2
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  imagenet, coco; teacher adm-imagenet-256-uncond
# Cost:   about 430 H100-hours in all, 16 of its own (an estimate, not measured)
# Status: not run
# Note:   only the 12 epochs are stated: the rest is ConvNeXt's own
set -euo pipefail
source "$(dirname "$0")/steps.sh"

evaluate_after pretrain-imagenet-convnext_base-adm --preset coco-cascade-1x --student convnext_base \
  --images "coco:$DATA/coco" --workers 16 "$@"

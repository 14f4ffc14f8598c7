#!/usr/bin/env bash
# Table:  COCO, ResNet-50, Mask R-CNN
# Row:    1x, ADM
# Paper:  box AP 44.1, mask AP 40.1
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  imagenet, coco; teacher adm-imagenet-256-uncond
# Cost:   about 340 H100-hours in all, 8.1 of its own (an estimate, not measured)
# Status: not run
set -euo pipefail
source "$(dirname "$0")/steps.sh"

evaluate_after pretrain-imagenet-resnet50-adm --preset coco-1x --student resnet50 \
  --images "coco:$DATA/coco" --workers 16 "$@"

#!/usr/bin/env bash
# Table:  generators, COCO
# Row:    1x, Stable Diffusion 1.4
# Paper:  box AP 43.3, mask AP 39.4
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  imagenet, coco; teacher sd-1.4
# Cost:   about 610 H100-hours in all, 8.1 of its own (an estimate, not measured)
# Status: not run
set -euo pipefail
source "$(dirname "$0")/steps.sh"

evaluate_after pretrain-imagenet-resnet50-sd --preset coco-1x --student resnet50 \
  --images "coco:$DATA/coco" --workers 16 "$@"

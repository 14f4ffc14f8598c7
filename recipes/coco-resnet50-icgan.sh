#!/usr/bin/env bash
# Table:  generators, COCO
# Row:    1x, ICGAN
# Paper:  box AP 40.0, mask AP 36.5
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  imagenet, coco; teacher icgan-256
# Cost:   about 110 H100-hours in all, 8.1 of its own (an estimate, not measured)
# Status: not run
set -euo pipefail
source "$(dirname "$0")/steps.sh"

evaluate_after pretrain-imagenet-resnet50-icgan --preset coco-1x --student resnet50 \
  --images "coco:$DATA/coco" --workers 16 "$@"

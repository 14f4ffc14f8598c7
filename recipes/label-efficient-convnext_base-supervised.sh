#!/usr/bin/env bash
# Table:  label-efficient
# Row:    convnext_base, ImageNet-supervised
# Paper:  mIoU of bedroom 41.0, ffhq 59.2, cat 47.3, horse 56.0
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  bedroom_28, ffhq_34, cat_15, horse_21
# Cost:   about 0.044 H100-hours in all (an estimate, not measured)
# Status: not run
# Note:   batch size and learning rate are not stated: ours
# Usage:  bash recipes/label-efficient-convnext_base-supervised.sh bedroom|ffhq|cat|horse [SETTING ...]
set -euo pipefail
source "$(dirname "$0")/steps.sh"

label_efficient "$@"
shift
dreamteacher evaluate --preset label-efficient --student convnext_base --init imagenet \
  --images "$LABELLED" --mask-counts "$COUNT" --workers 16 \
  --out "$RUNS/label-efficient-convnext_base-supervised-$SET" "$@"

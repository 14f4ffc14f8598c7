#!/usr/bin/env bash
# Table:  label-efficient
# Row:    convnext_base, label
# Paper:  mIoU of bedroom 54.6, ffhq 61.3, cat 58.4, horse 64.4
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  bedroom_28, lsun/bedroom, ffhq_34, ffhq, cat_15, lsun/cat, horse_21, lsun/horse; teacher
#         adm-lsun-bedroom, adm-ffhq, adm-lsun-cat, adm-lsun-horse
# Cost:   about 490 (bedroom), 11 (ffhq), 270 (cat), 330 (horse) H100-hours in all, 0.044 of its own (an
#         estimate, not measured)
# Status: not run
# Note:   batch size and learning rate are not stated: ours
# Usage:  bash recipes/label-efficient-convnext_base-label.sh bedroom|ffhq|cat|horse [SETTING ...]
set -euo pipefail
source "$(dirname "$0")/steps.sh"

label_efficient "$@"
shift
few_masks convnext_base label "$@"

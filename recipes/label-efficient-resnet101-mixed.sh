#!/usr/bin/env bash
# Table:  label-efficient
# Row:    resnet101, mixed
# Paper:  mIoU of bedroom 49.9, ffhq 59.4, cat 56.7, horse 65.9
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  bedroom_28, lsun/bedroom, ffhq_34, ffhq, cat_15, lsun/cat, horse_21, lsun/horse; teacher
#         adm-lsun-bedroom, adm-ffhq, adm-lsun-cat, adm-lsun-horse
# Cost:   about 430 (bedroom), 9.9 (ffhq), 230 (cat), 280 (horse) H100-hours in all, 0.027 of its own (an
#         estimate, not measured)
# Status: not run
# Note:   batch size and learning rate are not stated: ours
# Usage:  bash recipes/label-efficient-resnet101-mixed.sh bedroom|ffhq|cat|horse [SETTING ...]
set -euo pipefail
source "$(dirname "$0")/steps.sh"

label_efficient "$@"
shift
few_masks resnet101 mixed "$@"

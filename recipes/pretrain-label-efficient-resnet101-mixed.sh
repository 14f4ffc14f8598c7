#!/usr/bin/env bash
# Step:   resnet101 on a label-efficient set, mixed, taught by its adm
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487), appendix
# Needs:  bedroom_28, lsun/bedroom, ffhq_34, ffhq, cat_15, lsun/cat, horse_21, lsun/horse; teacher
#         adm-lsun-bedroom, adm-ffhq, adm-lsun-cat, adm-lsun-horse
# Cost:   about 430 (bedroom), 9.9 (ffhq), 230 (cat), 280 (horse) H100-hours in all (an estimate, not
#         measured)
# Status: not run
# Note:   how many images of LSUN were used is not stated: all
# Usage:  bash recipes/pretrain-label-efficient-resnet101-mixed.sh bedroom|ffhq|cat|horse [SETTING ...]
set -euo pipefail
source "$(dirname "$0")/steps.sh"

label_efficient "$@"
shift
pretrain_with_labels resnet101 mixed "$@"

#!/usr/bin/env bash
# Step:   convnext_base on a label-efficient set, label, taught by its adm
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487), appendix
# Needs:  bedroom_28, lsun/bedroom, ffhq_34, ffhq, cat_15, lsun/cat, horse_21, lsun/horse; teacher
#         adm-lsun-bedroom, adm-ffhq, adm-lsun-cat, adm-lsun-horse
# Cost:   about 490 (bedroom), 11 (ffhq), 270 (cat), 330 (horse) H100-hours in all (an estimate, not
#         measured)
# Status: not run
# Note:   how many images of LSUN were used is not stated: all
# Usage:  bash recipes/pretrain-label-efficient-convnext_base-label.sh bedroom|ffhq|cat|horse [SETTING ...]
set -euo pipefail
source "$(dirname "$0")/steps.sh"

label_efficient "$@"
shift
pretrain_with_labels convnext_base label "$@"

#!/usr/bin/env bash
# Step:   the interpreter of a label-efficient set
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487), appendix
# Needs:  bedroom_28, ffhq_34, cat_15, horse_21; teacher adm-lsun-bedroom, adm-ffhq, adm-lsun-cat,
#         adm-lsun-horse
# Cost:   about 0.0043 (bedroom), 0.0022 (ffhq), 0.0032 (cat), 0.0032 (horse) H100-hours in all (an
#         estimate, not measured)
# Status: not run
# Note:   its batch size is not stated: 4
# Usage:  bash recipes/interpreter-label-efficient.sh bedroom|ffhq|cat|horse [SETTING ...]
set -euo pipefail
source "$(dirname "$0")/steps.sh"

label_efficient "$@"
shift
dreamteacher get-teacher "$TEACHER" $ONLY_CHECK
dreamteacher train-interpreter --images "$LABELLED" --out "$RUNS/interpreter-label-efficient-$SET" \
  --teacher "$TEACHER" --t 50 "$@"

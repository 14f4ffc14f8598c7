#!/usr/bin/env bash
# Step:   resnet50 on BDD100K, taught by its adm, features at T = 150
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487), appendix
# Needs:  bdd100k
# Cost:   about 29 H100-hours in all, 10 of its own (an estimate, not measured)
# Status: not run
# Note:   the ablations' length is not stated: 600 epochs, as for the other rows
set -euo pipefail
source "$(dirname "$0")/steps.sh"

first teacher-adm-bdd100k
dreamteacher pretrain --images "bdd100k:$DATA/bdd100k" --out "$RUNS/pretrain-bdd100k-resnet50-adm-t150" \
  --teacher "$RUNS/teacher-adm-bdd100k" --t 150 --epochs 600 --warmup-epochs 30 --workers 16 "$@"

#!/usr/bin/env bash
# Step:   resnet50 on BDD100K, taught by its adm, deterministic encoding (DDIM inversion)
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487), appendix
# Needs:  bdd100k
# Cost:   about 160 H100-hours in all, 140 of its own (an estimate, not measured)
# Status: not run
# Note:   10 steps of DDIM; the ablations' length is not stated: 600 epochs, as for the other rows
set -euo pipefail
source "$(dirname "$0")/steps.sh"

first teacher-adm-bdd100k
dreamteacher pretrain --images "bdd100k:$DATA/bdd100k" --out "$RUNS/pretrain-bdd100k-resnet50-adm-ddim" \
  --teacher "$RUNS/teacher-adm-bdd100k" --t 50 --noise inversion --epochs 600 --warmup-epochs 30 \
  --workers 16 "$@"

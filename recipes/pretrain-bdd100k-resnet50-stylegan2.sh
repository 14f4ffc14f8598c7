#!/usr/bin/env bash
# Step:   resnet50 on BDD100K, taught by its stylegan2
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487), appendix
# Needs:  bdd100k
# Cost:   about 170 H100-hours in all, 87 of its own (an estimate, not measured)
# Status: not run
# Note:   samples of an epoch are not stated: as many as BDD100K has images
set -euo pipefail
source "$(dirname "$0")/steps.sh"

first teacher-stylegan2-bdd100k
dreamteacher pretrain --out "$RUNS/pretrain-bdd100k-resnet50-stylegan2" \
  --teacher "$RUNS/teacher-stylegan2-bdd100k" --dataset synthesized --samples 70000 --accumulate 8 \
  --epochs 600 --warmup-epochs 30 --workers 16 "$@"

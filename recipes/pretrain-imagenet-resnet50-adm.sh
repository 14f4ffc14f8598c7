#!/usr/bin/env bash
# Step:   resnet50 on ImageNet, taught by adm-imagenet-256-uncond
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487), appendix
# Needs:  imagenet; teacher adm-imagenet-256-uncond
# Cost:   about 340 H100-hours in all (an estimate, not measured)
# Status: not run
# Note:   the main text implies a learning rate of 1.6e-3
set -euo pipefail
source "$(dirname "$0")/steps.sh"

dreamteacher get-teacher adm-imagenet-256-uncond $ONLY_CHECK
dreamteacher pretrain --images "imagenet:$DATA/imagenet" --out "$RUNS/pretrain-imagenet-resnet50-adm" \
  --teacher adm-imagenet-256-uncond --t 150 --optimizer lamb --batch-size 2048 --accumulate 8 --epochs 200 \
  --warmup-epochs 30 --workers 16 "$@"

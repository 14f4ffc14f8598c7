#!/usr/bin/env bash
# Step:   convnext_base on ImageNet, taught by adm-imagenet-256-uncond
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487), appendix
# Needs:  imagenet; teacher adm-imagenet-256-uncond
# Cost:   about 420 H100-hours in all (an estimate, not measured)
# Status: not run
# Note:   the main text implies a learning rate of 1.6e-3
set -euo pipefail
source "$(dirname "$0")/steps.sh"

dreamteacher get-teacher adm-imagenet-256-uncond $ONLY_CHECK
dreamteacher pretrain --images "imagenet:$DATA/imagenet" --out "$RUNS/pretrain-imagenet-convnext_base-adm" \
  --teacher adm-imagenet-256-uncond --student convnext_base --t 150 --optimizer lamb --batch-size 2048 \
  --accumulate 16 --epochs 200 --warmup-epochs 30 --workers 16 "$@"

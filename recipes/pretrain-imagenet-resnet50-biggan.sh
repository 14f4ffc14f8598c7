#!/usr/bin/env bash
# Step:   resnet50 on ImageNet, taught by bigbigan-128
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487), appendix
# Needs:  teacher bigbigan-128
# Cost:   about 26 H100-hours in all (an estimate, not measured)
# Status: not run
# Note:   layers and size are not stated: 128 x 128, so there is no map at stride 32; samples of an epoch
#         are not stated: as many as ImageNet has images; the main text implies a learning rate of 1.6e-3
set -euo pipefail
source "$(dirname "$0")/steps.sh"

dreamteacher get-teacher bigbigan-128 $ONLY_CHECK
dreamteacher pretrain --out "$RUNS/pretrain-imagenet-resnet50-biggan" --teacher bigbigan-128 \
  --dataset synthesized --samples 1281167 --optimizer lamb --batch-size 2048 --accumulate 8 --epochs 200 \
  --warmup-epochs 30 --workers 16 "$@"

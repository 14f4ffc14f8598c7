#!/usr/bin/env bash
# Step:   resnet50 on ImageNet, taught by sd-1.4
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487), appendix
# Needs:  imagenet; teacher sd-1.4
# Cost:   about 600 H100-hours in all (an estimate, not measured)
# Status: not run
# Note:   T, prompt, layers and input size are not stated: T 150, empty prompt, images enlarged x2; the main
#         text implies a learning rate of 1.6e-3
set -euo pipefail
source "$(dirname "$0")/steps.sh"

dreamteacher get-teacher sd-1.4 $ONLY_CHECK
dreamteacher pretrain --images "imagenet:$DATA/imagenet" --out "$RUNS/pretrain-imagenet-resnet50-sd" \
  --teacher sd-1.4 --t 150 --optimizer lamb --batch-size 2048 --accumulate 8 --epochs 200 \
  --warmup-epochs 30 --workers 16 "$@"

#!/usr/bin/env bash
# Step:   resnet50 on ImageNet, taught by icgan-256
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487), appendix
# Needs:  imagenet; teacher icgan-256
# Cost:   about 98 H100-hours in all (an estimate, not measured)
# Status: not run
# Note:   layers are not stated; it draws like images of a bank, which `get-teacher` makes; samples of an
#         epoch are not stated: as many as ImageNet has images; the main text implies a learning rate of
#         1.6e-3; the bank needs SwAV's ResNet-50,
#         https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar
set -euo pipefail
source "$(dirname "$0")/steps.sh"

if ! dreamteacher list teachers --filter icgan-256 | grep -E '^icgan-256 +fetched' > /dev/null; then
  dreamteacher get-teacher icgan-256 --bank-images "$DATA/imagenet/train" \
    --embedder swav_800ep_pretrain.pth.tar $ONLY_CHECK
fi
dreamteacher pretrain --out "$RUNS/pretrain-imagenet-resnet50-icgan" --teacher icgan-256 \
  --dataset synthesized --samples 1281167 --optimizer lamb --batch-size 2048 --accumulate 8 --epochs 200 \
  --warmup-epochs 30 --workers 16 "$@"

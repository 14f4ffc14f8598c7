#!/usr/bin/env bash
# Table:  ImageNet, frozen
# Row:    ResNet-50, ADM, foreground and background
# Paper:  read-out 79.3
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  imagenet, fgbg; teacher adm-imagenet-256-uncond
# Cost:   about 340 H100-hours in all, 0.0097 of its own (an estimate, not measured)
# Status: not run
# Note:   the masks are not stated: images and black and white masks in train, train-masks, test, test-masks
set -euo pipefail
source "$(dirname "$0")/steps.sh"

evaluate_after pretrain-imagenet-resnet50-adm --preset readout --student resnet50 \
  --images "$DATA/fgbg/train" --masks "$DATA/fgbg/train-masks" --test-images "$DATA/fgbg/test" \
  --test-masks "$DATA/fgbg/test-masks" --binary-masks --workers 16 "$@"

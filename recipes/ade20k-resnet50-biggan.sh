#!/usr/bin/env bash
# Table:  generators, ADE20K
# Row:    UPerNet, unconditional BigGAN
# Paper:  mIoU 40.8
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  ade20k; teacher bigbigan-128
# Cost:   about 40 H100-hours in all, 14 of its own (an estimate, not measured)
# Status: not run
# Note:   optimizer, crops and auxiliary head are not stated: MMSegmentation's usual ones
set -euo pipefail
source "$(dirname "$0")/steps.sh"

evaluate_after pretrain-imagenet-resnet50-biggan --preset ade20k --student resnet50 \
  --images "ade20k:$DATA/ade20k" --workers 16 "$@"

#!/usr/bin/env bash
# Table:  BDD100K, in-domain
# Row:    semantic, StyleGAN2
# Paper:  mIoU 59.7
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  bdd100k
# Cost:   about 190 H100-hours in all, 14 of its own (an estimate, not measured)
# Status: not run
set -euo pipefail
source "$(dirname "$0")/steps.sh"

evaluate_after pretrain-bdd100k-resnet50-stylegan2 --preset bdd100k-semantic --student resnet50 \
  --images "bdd100k:$DATA/bdd100k" --workers 16 "$@"

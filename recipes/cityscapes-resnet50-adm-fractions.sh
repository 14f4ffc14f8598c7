#!/usr/bin/env bash
# Table:  Cityscapes, after BDD100K
# Row:    UPerNet, ADM, 744, 372, 100 labels
# Paper:  mIoU of 1/4 63.9, 1/8 60.0, 1/30 50.0
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  bdd100k, cityscapes
# Cost:   about 34 H100-hours in all, 5.1 of its own (an estimate, not measured)
# Status: not run
# Note:   which generator taught it is not stated: ADM; optimizer, crops and batch are usual ones
set -euo pipefail
source "$(dirname "$0")/steps.sh"

evaluate_after pretrain-bdd100k-resnet50-adm --preset cityscapes-fractions --student resnet50 \
  --images "cityscapes:$DATA/cityscapes" --workers 16 "$@"

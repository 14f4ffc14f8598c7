#!/usr/bin/env bash
# Table:  Cityscapes, after BDD100K
# Row:    UPerNet, ADM, all labels
# Paper:  mIoU 77.5
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  bdd100k, cityscapes
# Cost:   about 36 H100-hours in all, 6.8 of its own (an estimate, not measured)
# Status: not run
# Note:   which generator taught it is not stated: ADM; optimizer, crops and batch are usual ones
set -euo pipefail
source "$(dirname "$0")/steps.sh"

evaluate_after pretrain-bdd100k-resnet50-adm --preset cityscapes --student resnet50 \
  --images "cityscapes:$DATA/cityscapes" --workers 16 "$@"

#!/usr/bin/env bash
# Table:  ablations, BDD100K instances
# Row:    MSE alone
# Paper:  box AP 23.6, mask AP 20.3
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  bdd100k
# Cost:   about 180 H100-hours in all, 1.4 of its own (an estimate, not measured)
# Status: not run
# Note:   the teacher is not stated; the ablations' length is not stated: 600 epochs, as for the other rows
set -euo pipefail
source "$(dirname "$0")/steps.sh"

bdd100k_instances pretrain-bdd100k-resnet50-stylegan2-mse "$@"

#!/usr/bin/env bash
# Table:  ablations, BDD100K instances
# Row:    T = 50
# Paper:  box AP 23.8, mask AP 20.4
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  bdd100k
# Cost:   about 30 H100-hours in all, 1.4 of its own (an estimate, not measured)
# Status: not run
# Note:   length and teacher of the ablations are not stated; the main rows do better with the same settings
set -euo pipefail
source "$(dirname "$0")/steps.sh"

bdd100k_instances pretrain-bdd100k-resnet50-adm "$@"

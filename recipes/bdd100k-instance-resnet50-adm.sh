#!/usr/bin/env bash
# Table:  BDD100K, in-domain
# Row:    instance, ADM
# Paper:  box AP 26.7, mask AP 22.9
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  bdd100k
# Cost:   about 30 H100-hours in all, 1.4 of its own (an estimate, not measured)
# Status: not run
set -euo pipefail
source "$(dirname "$0")/steps.sh"

bdd100k_instances pretrain-bdd100k-resnet50-adm "$@"

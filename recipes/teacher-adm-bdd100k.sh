#!/usr/bin/env bash
# Step:   the preset adm-bdd100k on BDD100K
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487), appendix, Table 16
# Needs:  bdd100k
# Cost:   about 19 H100-hours in all (an estimate, not measured)
# Status: not run
set -euo pipefail
source "$(dirname "$0")/steps.sh"

dreamteacher train-teacher --images "bdd100k:$DATA/bdd100k" --out "$RUNS/teacher-adm-bdd100k" \
  --preset adm-bdd100k --workers 16 "$@"

#!/usr/bin/env bash
# Table:  BDD100K, in-domain
# Row:    panoptic, ImageNet-supervised
# Paper:  PQ 22.4
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  bdd100k
# Cost:   about 1.4 H100-hours in all (an estimate, not measured)
# Status: not run
set -euo pipefail
source "$(dirname "$0")/steps.sh"

dreamteacher evaluate --preset bdd100k-panoptic --student resnet50 --init imagenet \
  --images "bdd100k:$DATA/bdd100k" --workers 16 --out "$RUNS/bdd100k-panoptic-resnet50-supervised" "$@"

#!/usr/bin/env bash
# Table:  BDD100K, ImageNet pretraining
# Row:    instances, ADM
# Paper:  box AP 28.3, mask AP 24.8
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  imagenet, bdd100k; teacher adm-imagenet-256-uncond
# Cost:   about 340 H100-hours in all, 1.4 of its own (an estimate, not measured)
# Status: not run
set -euo pipefail
source "$(dirname "$0")/steps.sh"

bdd100k_instances pretrain-imagenet-resnet50-adm "$@"

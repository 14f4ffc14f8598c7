#!/usr/bin/env bash
# Table:  ImageNet, fine-tuned
# Row:    ResNet-50, ADM
# Paper:  top-1 80.2
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  imagenet; teacher adm-imagenet-256-uncond
# Cost:   about 370 H100-hours in all, 35 of its own (an estimate, not measured)
# Status: not run
set -euo pipefail
source "$(dirname "$0")/steps.sh"

evaluate_after pretrain-imagenet-resnet50-adm --preset imagenet-a2 --student resnet50 \
  --train "imagenet:$DATA/imagenet" --workers 16 "$@"

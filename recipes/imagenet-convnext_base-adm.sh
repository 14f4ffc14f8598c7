#!/usr/bin/env bash
# Table:  ImageNet, fine-tuned
# Row:    ConvNeXt-B, ADM
# Paper:  top-1 83.9
# Source: DreamTeacher, ICCV 2023 (arXiv 2307.07487): number in the tables, settings in the appendix
# Needs:  imagenet; teacher adm-imagenet-256-uncond
# Cost:   about 550 H100-hours in all, 130 of its own (an estimate, not measured)
# Status: not run
set -euo pipefail
source "$(dirname "$0")/steps.sh"

evaluate_after pretrain-imagenet-convnext_base-adm --preset imagenet-convnext --student convnext_base \
  --train "imagenet:$DATA/imagenet" --workers 16 "$@"

#!/usr/bin/env bash
# A folder that is not ours: CamVid's 367 training images, unlabelled; then 11-class segmentation with 20 labels.
# Usage: benchmarks/camvid/run.sh CAMVID RUNS      (CAMVID holds {images,labels}/{train,test}; RUNS is made)
set -euo pipefail
camvid=$1 runs=$2
dreamteacher train-teacher --images "$camvid/images/train" --out "$runs/camvid-teacher" \
  --preset cpu-64 --size 64 96 --steps 500 --sample-every 250 --save-every 250
dreamteacher pretrain --images "$camvid/images/train" --teacher "$runs/camvid-teacher" --student resnet18 \
  --out "$runs/camvid" --batch-size 32 --epochs 20 --warmup-epochs 2 --lr 2e-3 --width 128
rm -f "$runs/camvid/results.jsonl"
for init in random "$runs/camvid"; do
  dreamteacher evaluate --student resnet18 --init "$init" --size 64 96 --seeds 0 1 2 --mask-counts 20 \
    --tasks segment-frozen segment-finetune --out "$runs/camvid" --ignore-index 11 --segment.steps 300 \
    --images "$camvid/images/train" --masks "$camvid/labels/train" \
    --test-images "$camvid/images/test" --test-masks "$camvid/labels/test"
done
dreamteacher report --run "$runs/camvid"

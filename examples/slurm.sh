#!/bin/bash
# Pretraining on several machines of a SLURM cluster:
#   sbatch examples/slurm.sh --images DATA --teacher TEACHER --out RUN ...
# One torchrun a machine starts one process a GPU. --out and --images lie on a disk that all machines see.
# The same command goes on from the last checkpoint, with as many machines or others.
# 120 s before the time limit the run is told to save. torchrun waits 110 s for that, before torch 2.12 only 30 s.
#SBATCH --job-name=dreamteacher
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

processes=${SLURM_GPUS_ON_NODE:-1}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-$processes} / processes))
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$processes}  # srun does not take it from sbatch since SLURM 22.05
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110

srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
    -m dreamteacher pretrain "$@"

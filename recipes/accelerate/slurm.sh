#!/bin/bash
# Two machines with eight GPUs each under Slurm: sbatch recipes/accelerate/slurm.sh RECIPE RUN [key=value ...]
# RUN lies on a file system that all machines share. For FSDP2, the variables of fsdp2.yaml are set below; leave them out for DDP.
#SBATCH --job-name=rlhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -euo pipefail
recipe=${1:?a recipe} run=${2:?the folder of the run}
shift 2

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 # torchrun kills after 30 seconds else, before a large model is saved
export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
export FSDP_STATE_DICT_TYPE=FULL_STATE_DICT FSDP_CPU_RAM_EFFICIENT_LOADING=false ACCELERATE_MIXED_PRECISION=bf16

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One torchrun a machine; they find each other at the first one. A process that fails ends all of them, and the same sbatch goes on.
exec srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d \
  --rdzv_endpoint "$head:29500" -m rlhf run "$recipe" --out "$run" "$@"

#!/usr/bin/env bash
# Runs a command of sled (train, generate or eval) on the GPUs of several nodes, one task for each GPU.
#
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 scripts/launch_slurm.sh train --model /shared/llama ...
#
# Paths are the same on all nodes, and sled is installed on them (module load, or VENV=/shared/venv).
#SBATCH --job-name=sled
#SBATCH --output=%x-%j.log
# A task that ends with an error ends the others too: they would wait for it in their next exchange.
set -euo pipefail
[ -n "${SLURM_JOB_ID:-}" ] || { echo "start this script with sbatch" >&2; exit 2; }
[ -z "${VENV:-}" ] || source "$VENV/bin/activate"

# jax gives each task the GPU of its number on the node, so the number of tasks is the number of GPUs.
gpus=${SLURM_GPUS_ON_NODE:?ask for GPUs: sbatch --gpus-per-node=8}
[ "${SLURM_NTASKS_PER_NODE:-0}" = "$gpus" ] || { echo "start as many tasks as GPUs: --ntasks-per-node=$gpus" >&2; exit 2; }
command=${1:?name a command of sled: train, generate or eval}
shift
exec srun --kill-on-bad-exit=1 sled "$command" --cluster slurm "$@"

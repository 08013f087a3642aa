#!/usr/bin/env bash
# Whole nodes of eight GPUs under Slurm; arguments go to `run`:
#   sbatch --nodes=2 configs/clusters/slurm.sh --config v3-16b-8xh100 --gpus 16 --pp-size 8
# The folder it is submitted from must be on a file system that all nodes share, with .venv in it (scripts/setup).
# A requeued job has the number it had, so its run goes on where it was.
#SBATCH --job-name=ray-pipeline
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$head:$((20000 + SLURM_JOB_ID % 10000))" # a port of its own, where jobs share a node
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"
mkdir -p "$RAY_TMPDIR"
# On every node a part of the Ray cluster; on the first one the run as well, whose end ends them all.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "$SLURM_CPUS_PER_TASK" -- \
    env RAY_ADDRESS="$address" python -m ray_pipeline.cli run \
    --output-dir "$SLURM_SUBMIT_DIR/runs" --run-name "slurm-$SLURM_JOB_ID" "$@"

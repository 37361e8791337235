#!/bin/bash
# A suite as a Slurm job array, a shard a task; docs/regress.md has how to join the results.
#   sbatch --array=1-N slurm.sh SUITE.toml RESULTS [OPTION of kleak-vmm regress ...]
# RESULTS is a folder that all nodes see, as they see the suite and its kernels. Tasks with leaks or failed tests fail.
#SBATCH --job-name=kleak-regress
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --output=/dev/null
set -eu
suite=$1 results=$2
shift 2
mkdir -p "$results"
task=$SLURM_ARRAY_TASK_ID
exec > "$results/$task.log" 2>&1
exec kleak-vmm regress "$suite" --shard "$task/$SLURM_ARRAY_TASK_COUNT" --report "$results/$task.json" \
    --logs "$results/$task.guests" "$@"

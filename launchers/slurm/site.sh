# shellcheck shell=bash
# Sourced by the batch scripts first: what differs between clusters. Edit it once for all of them.

# module load python/3.12 cuda/13.0
# source /path/to/venv/bin/activate

# Compute nodes without internet. Download the teacher's weights on a login node and give
# teacher.weights=FILE to the scripts; docs/clusters.md has the command for each teacher.
# export HF_HUB_OFFLINE=1 # what is missing is an error at once, not after a minute of attempts
# export WANDB_MODE=offline # on a login node afterwards: wandb sync RUN_DIR/wandb/offline-run-*

python=${PYTHON:-$(command -v .venv/bin/python || command -v python)}
: "${python:?there is no .venv here and no python; activate an environment above, or export PYTHON}"
# Some versions of srun do not inherit it; a job with --cpus-per-gpu has none.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

#!/bin/bash
# The paper's setting on 4 nodes of 8 H200: sbatch tools/slurm.sh [arguments of kvpo_jax.main]
# The same command again continues the run. See docs/cluster.md.
#SBATCH --job-name=kvpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@1200
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# Compiled programs, once for all nodes. The directory and --workdir have to be on a file system that all nodes share.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/xla}
# JAX takes three quarters of a GPU's memory unless told otherwise.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
# Some sites route the coordinator's address through a proxy, where it is lost.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY

# One process per GPU, each of which sees all of its node's; jax picks by the local rank.
srun --gpu-bind=none --kill-on-bad-exit=1 \
    python -m kvpo_jax.main --config=configs/longlive.py --workdir=runs/paper "$@"

#!/bin/bash
# Trains on whole nodes under SLURM, one process a node:
#
#     sbatch --nodes=8 launch/slurm.sh --config=configs/ar_chunk3f.py --workdir=/shared/runs/ar \
#         --config.data.path=/shared/videos --config.data.batch_size=64
#
# Sampling is the same with SCRIPT=sample.py in front. See launch/README.md.

#SBATCH --job-name=lact
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Five minutes before the time is up this script is told (USR1), tells the processes (TERM), which
# finish the step and save, and puts the job back in the queue. A job that is preempted gets TERM
# from SLURM, and --requeue has it put back. Either way it goes on from its newest checkpoint.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# Change these for your cluster.
PYTHON=${PYTHON:-.venv/bin/python}   # on a file system that all nodes see, as is --workdir
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/lact_jax/jax}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# export NCCL_SOCKET_IFNAME=eth0     # where NCCL picks the wrong network interface

# Python finds out by itself: which process it is and how many there are (SLURM_PROCID, SLURM_NTASKS)
# and where the first one listens (the first host of SLURM_STEP_NODELIST, at a port made of the
# job's number; JAX_COORDINATOR_PORT sets another).
# A proxy must not be asked for the way to the other nodes.
export no_proxy="${no_proxy:+$no_proxy,}$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)"

time_is_up=no
trap 'time_is_up=yes; kill -TERM "$step"' USR1

# A process that is lost ends the others within a minute; --wait is for what hangs nevertheless.
# They leave one by one after saving, so that one that has left must not end the rest.
srun --kill-on-bad-exit=0 --wait=120 "$PYTHON" -u "${SCRIPT:-train.py}" "$@" &
step=$!

status=0
wait "$step" || status=$?
if [ "$time_is_up" = yes ]; then  # the first wait ended with the signal
    status=0
    wait "$step" || status=$?
fi
if [ "$time_is_up" = yes ] && [ "$status" -ne 0 ]; then
    echo "not finished (status $status): back in the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/usr/bin/env bash
# One rank, started by srun (see common.sh): names from Slurm to torch, then the trainer in place of this shell.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
# "2" or "2(x3),1": tasks a node; nodes are alike here.
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[!0-9]*}
# Until the trainer listens, a request to save and stop has nothing to save and must not kill. An ignored signal stays
# ignored through exec; Python's handler replaces it.
trap '' USR1
# End this rank if the run belongs to another start of the job by now (see claim). An unreadable file says nothing.
rank=$$
(
    while sleep 2 && kill -0 "$rank"; do
        now=$(cat "$OWNER") || now=$CLAIM
        [ "$now" = "$CLAIM" ] || [ -z "$now" ] || kill -KILL "$rank"
    done
) </dev/null >/dev/null 2>&1 &
exec "$PYTHON" launchers/train.py "$CONFIG"

#!/usr/bin/env bash
# One rank, started by srun (see common.sh): translates Slurm's variables to torch's, then execs the trainer.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
# Tasks per node, such as "2" or "2(x3),1"; all nodes have the same number here.
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[!0-9]*}
# Until the trainer handles the signal, a request to save and stop has nothing to save and must not kill. An ignored
# signal stays ignored through exec; the trainer's handler replaces it.
trap '' USR1
# Kill this rank once a different start of the job owns the run (see claim). An unreadable owner file is ignored.
rank=$$
(
    while sleep 2 && kill -0 "$rank"; do
        now=$(cat "$OWNER") || now=$CLAIM
        [ "$now" = "$CLAIM" ] || [ -z "$now" ] || kill -KILL "$rank"
    done
) </dev/null >/dev/null 2>&1 &
# An absolute path: a container may start in a folder of its image.
exec "$PYTHON" "$JOB/code/launchers/train.py" "$CONFIG"

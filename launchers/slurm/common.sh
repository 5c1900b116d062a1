# shellcheck shell=bash
# What the batch scripts share. A job's folder (see submit.py) holds everything that the job depends on:
#   code/       the packages as they were at submission
#   runs.txt    one run folder a line: one, or those of a sweep, one a task of the job array
#   N.yaml      the resolved configuration of line N (from 0)
#   job.env     PYTHON, DS_ACCELERATOR, CONTAINER (none, apptainer or pyxis), IMAGE, MOUNTS (folders it has to see)

# A request to save and stop that comes before there are ranks has nothing to save.
trap '' USR1

# load_job FOLDER: which run this job, or this task of a job array, is about.
load_job() {
    JOB=$1
    local index=${SLURM_ARRAY_TASK_ID:-0}
    # shellcheck source=/dev/null
    . "$JOB/job.env"
    RUN=$(sed -n "$((index + 1))p" "$JOB/runs.txt")
    CONFIG=$JOB/$index.yaml
    [ -n "$RUN" ] && [ -f "$CONFIG" ] || { echo "error: $JOB has no run $index: submit again" >&2; exit 2; }
    export JOB RUN CONFIG PYTHON DS_ACCELERATOR
    export PYTHONPATH=$JOB/code PYTHONUNBUFFERED=1
    cd "$JOB/code" || exit 2
}

# meet: where the ranks find each other. The port follows from the job and its restart, so that neither two jobs on a
# node nor the ranks that an earlier start of this job left behind can meet.
meet() {
    local restart=${SLURM_RESTART_COUNT:-0}
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + restart) % 10000))
    export MASTER_ADDR MASTER_PORT
}

# claim: refuse a run that another job is writing; from here on this start of the job owns the run folder. When a node is lost to Slurm while its processes live
# on, the job starts again elsewhere and two starts would write one folder; rank.sh ends ranks of any start but the
# last. If the owner before did not sign off, they get the time to notice.
claim() {
    mkdir -p "$RUN/slurm"
    OWNER=$RUN/slurm/owner
    CLAIM=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    export OWNER CLAIM
    local before=""
    [ ! -f "$OWNER" ] || before=$(cat "$OWNER")
    local other=${before%%.*}
    if [ -n "$other" ] && [ "$other" != "$SLURM_JOB_ID" ] && squeue -h -j "$other" -t RUNNING 2>/dev/null | grep -q .; then
        echo "error: job $other is writing $RUN: wait for it, or scancel it" >&2
        exit 2
    fi
    rm -f "$RUN/requeue"
    echo "$CLAIM" > "$OWNER.$CLAIM"
    mv "$OWNER.$CLAIM" "$OWNER"
    [ -z "$before" ] || [ "$before" = "$CLAIM" ] || { echo "start $before did not sign off: waiting 10 s"; sleep 10; }
}

# train [OPTIONS OF apptainer exec]: one task a rank; returns the exit code of the step.
train() {
    # --kill-on-bad-exit: without it the other ranks wait for a dead one until their time-out.
    local contained=() options=(--kill-on-bad-exit=1)
    case $CONTAINER in
        # The repository's packages come from the job's folder, the libraries from the image.
        apptainer) contained=(apptainer exec "$@" --bind "$MOUNTS" "$IMAGE") ;;
        pyxis) options+=(--container-image="$IMAGE" --container-mounts="$MOUNTS") ;;
    esac
    # SRUN_CPUS_PER_TASK: since Slurm 22.05 a step does not inherit the job's --cpus-per-task.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    # In the background: bash runs a trap only between commands, and `wait` returns for it.
    srun "${options[@]}" "${contained[@]}" bash "$JOB/code/launchers/slurm/rank.sh" &
    local step=$! code=0
    # --signal=B:USR1@N goes to this shell alone; `scancel` hands it to every rank of the first step.
    trap 'echo "time is nearly up: the ranks save and stop"; scancel --signal=USR1 "$SLURM_JOB_ID.0"' USR1
    while kill -0 "$step" 2>/dev/null; do
        code=0
        wait "$step" || code=$?
    done
    trap '' USR1
    return "$code"
}

# finish CODE: sign off, and start again if the trainer stopped for a signal with work left (it leaves RUN/requeue).
# No trap on TERM: `scancel` ends this shell, so that a cancelled job does not come back.
finish() {
    local code=$1 now
    # If Slurm has given this start up (a lost node, see claim), srun ends here with 0 and the job waits to start again.
    # Were this shell to end too, that would count as the end of the job; Slurm ends it when it finds the node again.
    now=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null) || now=""
    if [ -n "$now" ] && [[ "$now " != *" JobState=RUNNING "* || "$now " != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
        echo "Slurm has given up start $CLAIM: waiting to be ended"
        sleep infinity
    fi
    [ "$(cat "$OWNER")" != "$CLAIM" ] || rm -f "$OWNER"
    if [ "$code" = 0 ] && [ -e "$RUN/requeue" ]; then
        if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
            echo "error: stopped after ${SLURM_RESTART_COUNT} restarts: start it again with submit.py" >&2
            exit 1
        fi
        echo "start again: $RUN goes on from its last checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 600 # Slurm ends this shell; were it to exit first, the job could count as completed
    fi
    exit "$code"
}

# shellcheck shell=bash
# Functions that the batch scripts share. A job folder (see submit.py) has everything that the job depends on:
#   code/       the packages as they were at submission
#   runs.txt    run folders, one per line; in a sweep, line N is task N of the job array (from 0)
#   N.yaml      the resolved configuration of line N (from 0)
#   job.env     PYTHON, DS_ACCELERATOR, CONTAINER (none, apptainer or pyxis), IMAGE, MOUNTS (folders that it has to see)

# Ignore requests to save and stop before there are ranks: there is nothing to save.
trap '' USR1

# load_job FOLDER: load the settings of the run of this job, or of this task of a job array.
load_job() {
    JOB=$1
    local index=${SLURM_ARRAY_TASK_ID:-0}
    # shellcheck source=/dev/null
    . "$JOB/job.env"
    RUN=$(sed -n "$((index + 1))p" "$JOB/runs.txt")
    CONFIG=$JOB/$index.yaml
    [ -n "$RUN" ] && [ -f "$CONFIG" ] || { echo "error: $JOB has no run $index: submit it again" >&2; exit 2; }
    export JOB RUN CONFIG PYTHON DS_ACCELERATOR
    export PYTHONPATH=$JOB/code PYTHONUNBUFFERED=1
    cd "$JOB/code" || exit 2
}

# meet: set the rendezvous address of the ranks. The port is computed from the job id and restart count, so that ranks
# cannot connect to those of a different job on the node, or to leftovers of an earlier start of this job.
meet() {
    local restart=${SLURM_RESTART_COUNT:-0}
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + restart) % 10000))
    export MASTER_ADDR MASTER_PORT
}

# claim: refuse a run that a different job is writing; from here on this start of the job owns the run folder. When
# Slurm loses a node whose processes live on, the job starts again elsewhere and two starts would write to one folder,
# so rank.sh kills the ranks of any start but the latest. If the previous owner did not sign off, they get the time to
# notice.
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

# train [OPTIONS OF apptainer exec]: run the step with one task per rank; returns its exit code.
train() {
    # --kill-on-bad-exit: otherwise the other ranks would wait for a dead one until their time-out.
    local contained=() options=(--kill-on-bad-exit=1)
    case $CONTAINER in
        # The trainer's packages come from the job folder, libraries from the image.
        apptainer) contained=(apptainer exec "$@" --bind "$MOUNTS" "$IMAGE") ;;
        pyxis) options+=(--container-image="$IMAGE" --container-mounts="$MOUNTS" --container-workdir="$JOB/code") ;;
    esac
    # SRUN_CPUS_PER_TASK: since Slurm 22.05 a step does not inherit the job's --cpus-per-task.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    # In the background: bash runs a trap only between commands, and only `wait` is interrupted by one.
    srun "${options[@]}" "${contained[@]}" bash "$JOB/code/launchers/slurm/rank.sh" &
    local step=$! code=0
    # --signal=B:USR1@N signals only this shell; `scancel` forwards it to every rank of the first step.
    trap 'echo "time is nearly up: the ranks save and stop"; scancel --signal=USR1 "$SLURM_JOB_ID.0"' USR1
    while kill -0 "$step" 2>/dev/null; do
        code=0
        wait "$step" || code=$?
    done
    trap '' USR1
    return "$code"
}

# finish CODE: sign off, and requeue the job if the trainer stopped for a signal with work left (it leaves RUN/requeue).
# No trap on TERM: `scancel` ends this shell, so that a cancelled job is not requeued.
finish() {
    local code=$1 now
    # If Slurm has given up this start (a lost node, see claim), srun exits with 0 and the job waits to start again.
    # If this shell exited too, that would count as the end of the job; Slurm kills it when it finds the node again.
    now=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null) || now=""
    if [ -n "$now" ] && [[ "$now " != *" JobState=RUNNING "* || "$now " != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
        echo "Slurm has given up start $CLAIM: waiting to be killed"
        sleep infinity
    fi
    [ "$(cat "$OWNER")" != "$CLAIM" ] || rm -f "$OWNER"
    if [ "$code" = 0 ] && [ -e "$RUN/requeue" ]; then
        if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
            echo "error: stopped after ${SLURM_RESTART_COUNT} restarts: submit it again with submit.py" >&2
            exit 1
        fi
        echo "requeueing: $RUN resumes from its last checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 600 # Slurm kills this shell; if it exited first, the job could count as completed
    fi
    exit "$code"
}

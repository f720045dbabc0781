# shellcheck shell=bash
# Sourced by the batch scripts: requeues a job whose command has ended, or ends the job.

max_crashes=5 # in succession, for one job; after one more crash the job is not requeued

# scancel and preemption signal this shell too. Without a handler it would die before the ranks have
# saved; with one, bash waits for srun. Such a job is not requeued here: a cancelled job must stay
# cancelled, and SLURM itself requeues a preempted job.
cancelled=
trap 'cancelled=yes' TERM

# end_or_requeue CODE STOP_FILE: exit with CODE, or requeue the job.
#   0 done; 70 no progress; 78 will never work: the job ends.
#   75 stopped on request, or a full store: requeued, unless STOP_FILE exists.
#   other codes, crashes: requeued, max_crashes times in succession. SLURM itself requeues a job
#   whose node was lost.
end_or_requeue() {
    local code=$1 stop_file=$2
    local job=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    local crashes=slurm-$job.crashes
    case $code in
        0 | 70 | 78)
            rm -f "$crashes"
            exit "$code"
            ;;
        75) rm -f "$crashes" ;;
        *) echo "$code" >>"$crashes" ;;
    esac
    if [ -n "$cancelled" ]; then
        echo "exited with code $code after SIGTERM; not requeued by this script"
        exit "$code"
    fi
    if [ -e "$stop_file" ]; then
        echo "exited with code $code; not requeued because $stop_file exists"
        exit "$code"
    fi
    if [ -e "$crashes" ] && [ "$(wc -l <"$crashes")" -gt "$max_crashes" ]; then
        echo "exited with code $code; not requeued because the $max_crashes launches before crashed too"
        exit "$code"
    fi
    echo "exited with code $code; requeued"
    trap - TERM
    scontrol requeue "$job" || exit "$code"
    sleep 120 # SLURM ends this script
}

# shellcheck shell=bash
# Sourced by the batch scripts: what becomes of a job whose command has ended.

max_crashes=5 # in a row, for one job; none is queued again after that

# scancel and preemption tell this shell too. Without a handler it would die before the ranks have
# saved; with one, bash waits for srun. Such a job is not queued again from here: a cancelled one
# must stay so, and a preempted one is queued by SLURM.
cancelled=
trap 'cancelled=yes' TERM

# end_or_requeue CODE STOP_FILE: leave with CODE, or queue the job again.
#   0 done; 70 no progress; 78 will never work: the end.
#   75 stopped on request, or a full store: again, unless somebody made STOP_FILE.
#   other codes, crashes: again, max_crashes times in a row. A lost node is queued by SLURM itself.
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
        echo "left with $code after SIGTERM; not queued again from here"
        exit "$code"
    fi
    if [ -e "$stop_file" ]; then
        echo "left with $code; not queued again, for there is $stop_file"
        exit "$code"
    fi
    if [ -e "$crashes" ] && [ "$(wc -l <"$crashes")" -gt "$max_crashes" ]; then
        echo "left with $code; the last $max_crashes starts crashed too, not queued again"
        exit "$code"
    fi
    echo "left with $code; queued again"
    trap - TERM
    scontrol requeue "$job" || exit "$code"
    sleep 120 # SLURM ends this script
}

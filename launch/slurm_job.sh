#!/usr/bin/env bash
# What slurm.sh submits: runs its words as the tasks of the job. It sources nothing: what SLURM runs
# is a copy that lies elsewhere.

set -uo pipefail

# USR1 comes from SLURM (--signal of sbatch), to this shell alone. The tasks get their TERM from
# scancel, which does not end the job; srun would answer one by killing them after some seconds.
requeue=''
trap 'requeue=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# srun does not take this from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
srun --kill-on-bad-exit=1 "$@" &
srun=$!
wait "$srun"
status=$?
if [[ -n $requeue ]]; then
  wait "$srun" # the signal has ended the wait before
  status=$?
  if ((status == 0)); then
    echo "saved; job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"

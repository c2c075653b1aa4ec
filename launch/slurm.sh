#!/usr/bin/env bash
# Submits a job to SLURM: one process for each GPU of several nodes.
#
#   launch/slurm.sh --nodes=4 --gpus_per_node=8 --time=12:00:00 \
#     train --gin_file=jobs/phase1_ml100k.gin --gin.MODEL_DIR=/shared/runs/phase1
#
# What follows the command (train or evaluate) is given to `ilm --multiprocess` as it is; JAX reads
# from SLURM's environment who is who. Before the time is up the job saves, and is queued again. All
# paths must be the same on all nodes. FLAGS stand before the command:
#   --nodes=N          how many
#   --gpus_per_node=N  GPUs of each, and processes
#   --time=TIME        of one run, as SLURM writes it: 90, 12:00:00, 1-12 (days-hours)
#   --cpus_per_task=N  cores of each process (default 8)
#   --save_seconds=N   how long before the end of the time the job is told to save (default 300)
#   --name=NAME        names the job and its log, NAME-JOBID.log (default ilm)
#   --sbatch=FLAG      another flag of sbatch, as in --sbatch=--partition=gpu; repeatable
#   --ilm=PATH         the program (default: the PATH's)
#   --env=NAME=VALUE   for the job's environment; repeatable
#   --dry_run          print the command and run nothing
#   --help             print this

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

nodes='' gpus_per_node='' time='' cpus_per_task=8 save_seconds=300 name=ilm more=()
ilm=$(command -v ilm || echo ilm)
while (($#)); do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus_per_node=*) gpus_per_node=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --cpus_per_task=*) cpus_per_task=${1#*=} ;;
    --save_seconds=*) save_seconds=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --sbatch=-*) more+=("${1#*=}") ;;
    --ilm=*) ilm=${1#*=} ;;
    *) common_flag "$1" || break ;;
  esac
  shift
done
require nodes gpus_per_node time
for flag in nodes gpus_per_node cpus_per_task save_seconds; do
  check $flag '[1-9][0-9]*' 'a number from 1 on'
done
check time '[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}' 'minutes, H:M:S, or D-H:M:S'
check name '[A-Za-z0-9_.-]+' 'letters, digits, "_", "." and "-"'
check_words "$@"
make_job "$ilm" "$1" --multiprocess "${@:2}"

# Every process sees all GPUs of its node, and JAX takes the one with the process's number: hence
# GPUs by the node, never by the task.
run sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus_per_node" \
  "--gpus-per-node=$gpus_per_node" "--cpus-per-task=$cpus_per_task" "--time=$time" \
  "--signal=B:USR1@$save_seconds" --requeue --open-mode=append "--output=$name-%j.log" \
  ${more[@]+"${more[@]}"} "$here/slurm_job.sh" "${job[@]}"

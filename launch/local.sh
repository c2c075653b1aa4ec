#!/usr/bin/env bash
# Runs a job on this machine, on all its devices.
#
#   launch/local.sh [FLAGS] train --gin_file=jobs/phase1_ml100k.gin --gin.MODEL_DIR=runs/phase1
#
# What follows the command (train or evaluate) is given to `ilm` as it is. FLAGS stand before it:
#   --cpu_devices=N    so many CPU devices in each process, whatever else there is: a rehearsal
#   --processes=N      so many processes, as on so many hosts (with --cpu_devices)
#   --port=PORT        where the processes meet (default 12355)
#   --ilm=PATH         the program (default: the PATH's, else that of this clone's .venv)
#   --env=NAME=VALUE   for the job's environment; repeatable
#   --dry_run          print the commands and run nothing
#   --help             print this

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

cpu_devices='' processes=1 port=12355
ilm=$(command -v ilm || echo "$here/../.venv/bin/ilm")
while (($#)); do
  case $1 in
    --cpu_devices=*) cpu_devices=${1#*=} ;;
    --processes=*) processes=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --ilm=*) ilm=${1#*=} ;;
    *) common_flag "$1" || break ;;
  esac
  shift
done
check processes '[1-9][0-9]*' 'a number from 1 on'
check port '[1-9][0-9]*' 'a number from 1 on'
check_words "$@"
[[ -n $dry_run || -x $ilm ]] || die "no program $ilm: install ilm_jax, or name it: --ilm=PATH."
if [[ -n $cpu_devices ]]; then
  check cpu_devices '[1-9][0-9]*' 'a number from 1 on'
  environment+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$cpu_devices")
elif ((processes > 1)); then
  die "--processes=$processes: one process takes all accelerators of a machine. To rehearse several
  hosts on CPUs, give --cpu_devices=N as well."
fi
command=$1
shift

make_job "$ilm" "$command"

if ((processes == 1)); then
  [[ -n $dry_run ]] || exec "${job[@]}" "$@"
  run "${job[@]}" "$@"
  exit
fi

pids=() stopping=''
trap 'stopping=1; kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  where=("--coordinator=localhost:$port" "--num_processes=$processes" "--process_id=$i")
  if [[ -n $dry_run ]]; then
    run "${job[@]}" --multiprocess "${where[@]}" "$@"
  else # not by `run`: signals are for the process itself
    "${job[@]}" --multiprocess "${where[@]}" "$@" &
    pids+=($!)
  fi
done
status=0
for pid in ${pids[@]+"${pids[@]}"}; do
  ended=0
  wait "$pid" || ended=$?
  if [[ -n $stopping ]]; then # the signal has ended the wait, and not yet the process
    ended=0
    wait "$pid" || ended=$?
  fi
  ((status)) || status=$ended
done
exit "$status"

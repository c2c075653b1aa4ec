#!/usr/bin/env bash
# Installs ilm_jax on all workers of a Cloud TPU VM, and starts, watches and stops jobs there.
#
#   at='--tpu=NAME --zone=ZONE --project=PROJECT'
#   launch/tpu_vm.sh $at --install=dist/ilm_jax-0.1.0-py3-none-any.whl
#   launch/tpu_vm.sh $at train --gin_file=jobs/phase1_ml100k.gin --gin.MODEL_DIR=/mnt/ilm/phase1
#   launch/tpu_vm.sh $at --logs
#   launch/tpu_vm.sh $at --stop
#
# What follows the command (train or evaluate) is given to `ilm --multiprocess` on every worker as
# it is; relative paths are relative to the home directory there. FLAGS stand before it:
#   --tpu=NAME         of the TPU VM
#   --zone=ZONE        where it is
#   --project=PROJECT  whose it is
#   --install=WHAT     a wheel on this machine, or git+https://...; goes into ~/ilm_env there
#   --copy=PATH        a file or a folder (of gin files, say) for the home directory; repeatable
#   --name=NAME        names ilm_jobs/NAME.log and .pid on the workers (default: ilm)
#   --logs             follow the log of a worker
#   --worker=N         which (default 0)
#   --stop             ask the job to save and stop (SIGTERM to all its processes)
#   --env=NAME=VALUE   for the job's environment; repeatable
#   --dry_run          print the commands and run nothing
#   --help             print this

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tpu='' zone='' project='' install='' copies=() name=ilm action='' worker=0
while (($#)); do
  case $1 in
    --tpu=*) tpu=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --install=*) install=${1#*=} ;;
    --copy=*) copies+=("${1#*=}") ;;
    --name=*) name=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --logs | --stop) action=$1 ;;
    *) common_flag "$1" || break ;;
  esac
  shift
done
require tpu zone project
check tpu '[a-z]([-a-z0-9]*[a-z0-9])?' 'lower-case letters, digits and "-", a letter first'
check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone is like us-west4-a'
check project '[-a-z0-9.:]+' 'the id of a project, like my-project-123'
check name '[A-Za-z0-9_.-]+' 'letters, digits, "_", "." and "-"'
check worker '[0-9]+' 'the number of a worker'
if [[ -n $action ]]; then
  (($# == 0)) || die "$action is for a job that runs already: it goes without $1."
elif (($#)) || [[ -z $install && ${#copies[@]} == 0 ]]; then
  check_words "$@"
fi

there=("--zone=$zone" "--project=$project")
on_workers() { # WORKER SCRIPT
  run gcloud compute tpus tpu-vm ssh "$tpu" "${there[@]}" "--worker=$1" "--command=$2"
}
to_workers() { # PATH
  [[ -e $1 ]] || die "there is no $1 on this machine."
  run gcloud compute tpus tpu-vm scp --recurse "$1" "$tpu:" "${there[@]}" --worker=all
}

for path in ${copies[@]+"${copies[@]}"}; do to_workers "$path"; done

if [[ -n $install ]]; then
  case $install in
    *.whl)
      to_workers "$install"
      wanted="./${install##*/}[tpu]"
      ;;
    git+*) wanted="ilm_jax[tpu] @ $install" ;;
    *) die "--install=$install: a wheel (pip wheel --no-deps -w dist .), or git+https://..." ;;
  esac
  # The images of Cloud TPUs come with a Python that is too old: uv brings one.
  on_workers all "set -e
    if [ ! -x ilm_env/bin/python ]; then
      python3 -m pip install --user --quiet uv
      python3 -m uv venv --quiet --seed --python=3.11 ilm_env
    fi
    ilm_env/bin/pip install --quiet $(quoted "$wanted")
    ilm_env/bin/pip install --quiet --force-reinstall --no-deps $(quoted "$wanted")"
fi

if [[ $action == --logs ]]; then
  on_workers "$worker" "tail -n 100 -F ilm_jobs/$name.log"
elif [[ $action == --stop ]]; then
  on_workers all "kill -TERM \"\$(cat ilm_jobs/$name.pid)\""
elif (($#)); then
  make_job ilm_env/bin/ilm "$1" --multiprocess "${@:2}"
  # Not tied to the connection, and its log goes on where an earlier one of this name has ended.
  on_workers all "mkdir -p ilm_jobs
    if kill -0 \"\$(cat ilm_jobs/$name.pid 2>/dev/null)\" 2>/dev/null; then
      echo 'the job $name runs already: --stop it, or give this one another --name' >&2
      exit 1
    fi
    nohup $(quoted "${job[@]}") >>ilm_jobs/$name.log 2>&1 </dev/null &
    echo \$! >ilm_jobs/$name.pid"
fi

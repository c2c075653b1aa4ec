#!/usr/bin/env bash
# Starts a job on a TPU slice of a GKE cluster, through xpk.
#
#   launch/gke_xpk.sh --workload=NAME --cluster=CLUSTER --project=PROJECT --zone=ZONE \
#     --tpu_type=v5litepod-16 --image=IMAGE --storage=NAME \
#     train --gin_file=jobs/phase1_ml100k.gin --gin.MODEL_DIR=/mnt/ilm/runs/phase1
#
# What follows the command (train or evaluate) is given to `ilm --multiprocess` on every host as it
# is. FLAGS stand before it:
#   --workload=NAME    of the job, new for every start
#   --cluster=CLUSTER  that `xpk cluster create` made
#   --project=PROJECT  whose it is
#   --zone=ZONE        where it is
#   --tpu_type=TYPE    of the slice, as xpk names it: v5litepod-16, v5p-32, v6e-16
#   --image=IMAGE      made from the Containerfile, in a registry that the cluster reads
#   --storage=NAME     that `xpk storage` made: a bucket or a Filestore to mount; repeatable
#   --max_restarts=N   after a preemption or a failure of a machine (default 20)
#   --xpk=FLAG         another flag of `xpk workload create`, as in --xpk=--priority=high; repeat it
#   --env=NAME=VALUE   for the job's environment; repeatable
#   --dry_run          print the command and run nothing
#   --help             print this

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

workload='' cluster='' project='' zone='' tpu_type='' image='' max_restarts=20 more=()
while (($#)); do
  case $1 in
    --workload=*) workload=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --tpu_type=*) tpu_type=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --storage=*) more+=("$1") ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --xpk=--*) more+=("${1#*=}") ;;
    *) common_flag "$1" || break ;;
  esac
  shift
done
require workload cluster project zone tpu_type image
pattern='[a-z]([-a-z0-9]{0,38}[a-z0-9])?'
check workload "$pattern" 'at most 40 lower-case letters, digits and "-", a letter first'
check cluster "$pattern" 'at most 40 lower-case letters, digits and "-", a letter first'
check project '[-a-z0-9.:]+' 'the id of a project, like my-project-123'
check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone is like us-west4-a'
check max_restarts '[0-9]+' 'a number'
check_words "$@"
make_job ilm "$1" --multiprocess "${@:2}"

# xpk puts the command into a shell script. Told to stop, `ilm` saves and ends well; Kubernetes must
# not take that for the end of the training: 143 makes it start again. So does 1, with which `ilm`
# ends when another process is gone.
script="trap 'kill -TERM \$!; wait \$!; exit 143' TERM;"
script+=" $(quoted "${job[@]}") & wait \$!"
# The script is one line of YAML, in which Kubernetes replaces $(NAME), and $$ by $.
case $script in
  *$'\n'* | *"\$("* | *"\$\$"*)
    die 'a value with a line break (or another control character, together with $) does not get
  through Kubernetes: put it into a gin file.'
    ;;
esac
run xpk workload create "--workload=$workload" "--cluster=$cluster" "--project=$project" \
  "--zone=$zone" "--tpu-type=$tpu_type" "--docker-image=$image" "--max-restarts=$max_restarts" \
  --restart-on-exit-codes=1 --termination-grace-period-seconds=300 \
  ${more[@]+"${more[@]}"} "--command=$script"

# shellcheck shell=bash
# What the launchers share; they source it. Runs in the bash 3.2 of a Mac, too.

environment=() # of the job: NAME=VALUE
dry_run=''

die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# The comment at the top of a launcher is its help.
print_help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 0
}

# Takes a flag that all launchers have; returns 1 where the words for `ilm` begin.
common_flag() {
  case $1 in
    --help | -h) print_help ;;
    --dry_run) dry_run=1 ;;
    --env=*)
      [[ $1 =~ ^--env=[A-Za-z_][A-Za-z0-9_]*= ]] || die "$1: write --env=NAME=VALUE."
      environment+=("${1#--env=}")
      ;;
    -*)
      local known
      known=$(print_help | grep -oE '^  --[a-z_]+(=[A-Z=]+)?' | tr -s ' \n' ' ')
      die "unknown flag $1; before the command there are:${known% }."
      ;;
    *) return 1 ;;
  esac
}

# require NAME...: each must have been given as --NAME=VALUE.
require() {
  local name
  for name; do
    [[ -n ${!name} ]] || die "--$name=... is missing; --help tells what it is."
  done
}

# check NAME PATTERN RULE: the value of --NAME must match.
check() {
  [[ ${!1} =~ ^($2)$ ]] || die "--$1=${!1}: $3."
}

# Checks the words for `ilm`, as far as that can be done where there is no `ilm`.
check_words() {
  local word
  (($#)) || die 'what is to run? A command of ilm and its flags, as in: train --gin_file=FILE'
  [[ $1 == train || $1 == evaluate ]] || die "$1: what can be launched is train and evaluate."
  for word in "${@:2}"; do
    case $word in
      --multiprocess* | --coordinator* | --num_processes* | --process_id*)
        die "$word: leave it out, the launcher knows."
        ;;
      --?*) ;;
      *) die "$word is no flag: was it cut off by a space? Quote it: --gin.NAME='[1, 2]'." ;;
    esac
  done
}

# The words as a shell reads them back. A far side that reads them is bash, too.
quoted() {
  local words
  printf -v words ' %q' "$@"
  printf '%s' "${words:1}"
}

# Sets `job`: the words, with the job's environment before them.
make_job() {
  job=()
  ((${#environment[@]} == 0)) || job=(env "${environment[@]}")
  job+=("$@")
}

# Runs a command and says so; with --dry_run only prints it, to the standard output.
run() {
  if [[ -n $dry_run ]]; then
    quoted "$@"
    echo
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

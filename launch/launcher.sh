# What tpu_queued_resource.sh and xpk.sh share.  However they end, they name the resource that may
# still cost money and print the command that deletes it.
# shellcheck shell=bash

dry=false      # with --dry-run, commands are printed and none is run
left=false     # whether the resource may be there
resource=''    # its name and where it is, for people
remove=()      # the command that deletes it
scratch=''     # a folder of temporary files
train=()       # flags of the training
create_args=() # flags of the command that creates the resource

say() { printf '[launch] %s\n' "$*" >&2; }

fail() { # EXIT_CODE SENTENCE
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}

run() { # COMMAND...
  if $dry; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

on_exit() {
  [ -z "$scratch" ] || rm -rf "$scratch"
  $left && ! $dry || return 0
  say "$resource may still be running and costs money until it is deleted."
  say "The same command as before goes on with it; this one deletes it:"
  dry=true run "${remove[@]}" >&2
}
# SIGTERM and SIGHUP end bash at once and run this.  SIGINT has a trap of its own, as bash ignores it
# where the command in the foreground has caught it.
trap on_exit EXIT
trap 'exit 130' INT

delete() { # returns 1 if the resource may be there after three attempts
  local attempt
  for attempt in 1 2 3; do
    if run "${remove[@]}" || ! exists; then
      left=false
      return
    fi
    say "deleting $resource failed ($attempt of 3)"
    [ "$attempt" = 3 ] || sleep 10
  done
  return 1
}

# parse REQUIRED OPTIONAL SWITCHES ARGUMENTS...
# Each of the options in the first two lists sets a variable of its name, such as tpu_type for
# --tpu-type, and each of the switches sets one to true.
parse() {
  local required=$1 optional=$2 switches=$3 option variable
  shift 3
  while [ $# -gt 0 ]; do
    option=$1 variable=${1#--}
    shift
    case "$option" in
      --) train=("$@"); break ;;
      --help) usage; exit 0 ;;
      --dry-run) dry=true; continue ;;
    esac
    if [[ " $switches " == *" $option "* ]]; then
      printf -v "${variable//-/_}" true
      continue
    fi
    [[ " $required $optional --create-arg " == *" $option "* ]] ||
      fail 2 "Unknown option $option: see --help; flags of the training come after --."
    [ $# -gt 0 ] || fail 2 "$option needs a value: see --help."
    case "$option" in
      --create-arg) create_args+=("$1") ;;
      *) printf -v "${variable//-/_}" '%s' "$1" ;;
    esac
    shift
  done
  for option in $required; do
    variable=${option#--} variable=${variable//-/_}
    [ -n "${!variable}" ] || fail 2 "$option is missing: see --help."
  done
  for option in --config --workdir; do
    [[ " ${train[*]-} " == *" $option"* ]] || fail 2 "No $option after --: see --help."
  done
}

need_number() { # OPTION VALUE LEAST
  [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] && [ "$2" -ge "$3" ] || fail 2 "$1=$2: write a whole number from $3."
}

need_name() { # OPTION VALUE
  [[ $2 =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    fail 2 "$1=$2: write a name of small letters, digits and dashes, with a letter first."
}

need_tools() { # TOOL...; sets project to gcloud's if it is empty
  local tool
  ! $dry || return 0
  for tool in "$@"; do
    command -v "$tool" >/dev/null || fail 2 "$tool is not installed or not on the PATH."
  done
  project=${project:-$(gcloud config get-value project 2>/dev/null | tail -n 1 || true)}
  [ -n "$project" ] || fail 2 "gcloud has no default project: give --project."
}

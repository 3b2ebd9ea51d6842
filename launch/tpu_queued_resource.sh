#!/usr/bin/env bash
# Trains on one or several Cloud TPU slices, from asking for them to the last step: see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_queued_resource.sh [options] -- --config FILE:ARGS --workdir DIR [train flags]

Asks for TPU slices as a queued resource, waits for them, installs this commit on every host, starts
`python -m mofi_jax.train` with the flags after -- on all of them and follows the log of the first.
Preempted slices are deleted, asked for again and go on with the same command.  Interrupted here
(Ctrl-C), the training goes on; the same command follows it again.

  --name NAME              of the queued resource (required)
  --zone ZONE              (required)
  --accelerator-type TYPE  such as v5litepod-64, v5p-128, v6e-64 (required)
  --project PROJECT        default: that of gcloud's configuration
  --runtime-version NAME   default: by the accelerator type
  --slices N               several slices of that type (multislice); default 1
  --spot                   capacity that may be taken away at any time
  --reserved               capacity of a reservation
  --create-arg ARG         one more flag for `queued-resources create`; may be repeated
  --bucket BUCKET          mounted at /mnt/BUCKET on every host, for --workdir and the data
  --max-crashes N          give up after that many crashes; default 3 (preemptions never count)
  --keep                   leave the slices when the run has ended: they cost money until deleted
  --poll SECONDS           between two looks at the run; default 30
  --dry-run                print the commands and run none
  --help

Slices that this command asked for are deleted when the run has ended; slices that were there
before are kept.  Exit code: that of the training (0 finished, 2 bad input), or 1.
TEXT
}

say() { printf '[launch] %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit "${2:-2}"; }
need() { [ "$2" -ge 2 ] || fail "$1 needs a value: see --help."; }

name='' zone='' type='' project='' runtime='' slices=1 bucket='' max_crashes=3 poll=30
keep=false dry=false capacity=() create_args=()
while [ $# -gt 0 ]; do
  case "$1" in
    --name) need "$1" $#; name=$2; shift ;;
    --zone) need "$1" $#; zone=$2; shift ;;
    --accelerator-type) need "$1" $#; type=$2; shift ;;
    --project) need "$1" $#; project=$2; shift ;;
    --runtime-version) need "$1" $#; runtime=$2; shift ;;
    --slices) need "$1" $#; slices=$2; shift ;;
    --create-arg) need "$1" $#; create_args+=("$2"); shift ;;
    --bucket) need "$1" $#; bucket=${2#gs://}; shift ;;
    --max-crashes) need "$1" $#; max_crashes=$2; shift ;;
    --poll) need "$1" $#; poll=$2; shift ;;
    --spot | --reserved) capacity+=("$1") ;;
    --keep) keep=true ;;
    --dry-run) dry=true ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "Unknown option $1: see --help; flags of the training come after --." ;;
  esac
  shift
done
[ -n "$name" ] || fail "--name is missing: see --help."
[ -n "$zone" ] || fail "--zone is missing: see --help."
[ -n "$type" ] || fail "--accelerator-type is missing: see --help."
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices: write a number from 1."
[[ $max_crashes =~ ^[0-9]+$ ]] || fail "--max-crashes=$max_crashes: write a number from 0."
[ ${#capacity[@]} -le 1 ] || fail "--spot and --reserved exclude each other: choose one."
[[ " $* " == *" --config"* ]] || fail "No --config after --: see --help."
[[ " $* " == *" --workdir"* ]] || fail "No --workdir after --: see --help."
if [ -z "$runtime" ]; then
  case "$type" in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "No runtime version is known for $type: give --runtime-version." ;;
  esac
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'say "interrupted: the training goes on; the same command follows it again"; exit 130' INT

nodes=("$name")
node_args=(--node-id "$name")
if [ "$slices" -gt 1 ]; then
  node_args=(--node-count "$slices" --node-prefix "$name")
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# ------------------------------------------------------------------------- gcloud
tpus() { # what changes something: printed instead of run with --dry-run
  local command=(gcloud compute tpus "$@" --zone "$zone" --quiet)
  [ -z "$project" ] || command+=(--project "$project")
  if $dry; then
    printf '%q ' "${command[@]}"
    printf '\n'
  else
    "${command[@]}"
  fi
}

state() { # prints the queued resource's state, NONE without one, UNKNOWN when gcloud fails
  if $dry; then printf 'ACTIVE'; return; fi
  local found
  if found=$(tpus queued-resources describe "$name" --format 'value(state.state)' \
    2>"$scratch/errors"); then
    printf '%s' "$found"
  elif grep -qi 'not[ _]found' "$scratch/errors"; then
    printf 'NONE'
  else
    cat "$scratch/errors" >&2
    printf 'UNKNOWN'
  fi
}

on_all() { # a command of tpu_host.sh on every host of every slice
  local command node
  command="bash mofi_jax/launch/tpu_host.sh $(printf '%q ' "$@")"
  for node in "${nodes[@]}"; do
    tpus tpu-vm ssh "$node" --worker all --command "$command" || return 1
  done
}

on_first() {
  tpus tpu-vm ssh "${nodes[0]}" --worker 0 \
    --command "bash mofi_jax/launch/tpu_host.sh $(printf '%q ' "$@")"
}

# ------------------------------------------------------------------------- stages
owned=false fresh=false
create() {
  say "asking for $slices x $type as $name in $zone"
  tpus queued-resources create "$name" "${node_args[@]}" --accelerator-type "$type" \
    --runtime-version "$runtime" "${capacity[@]+"${capacity[@]}"}" \
    "${create_args[@]+"${create_args[@]}"}" || fail "The request for $name was refused." 1
  owned=true fresh=true
}

delete() { tpus queued-resources delete "$name" --force; }

ensure_active() { # returns when the slices are there
  local now last='' failures=0 unknown=0
  if $dry; then create; return; fi
  while :; do
    now=$(state)
    [ "$now" = "$last" ] || say "$name: $now"
    last=$now
    [ "$now" = UNKNOWN ] && unknown=$((unknown + 1)) || unknown=0
    case "$now" in
      ACTIVE) return ;;
      NONE) create; continue ;;
      SUSPENDED) delete; continue ;; # preempted: nothing but its name is left
      FAILED)
        failures=$((failures + 1))
        tpus queued-resources describe "$name" --format 'yaml(state)' >&2 || true
        [ "$failures" -lt 3 ] || fail "$name failed $failures times: see its state above." 1
        delete
        continue
        ;;
    esac
    [ "$unknown" -lt 20 ] || fail "gcloud cannot tell the state of $name: see its errors above." 1
    sleep "$poll"
  done
}

install() { # this commit, its requirements and the bucket, on every host
  local node
  git -C "$root" diff --quiet HEAD || say "uncommitted changes do not travel to the hosts"
  git -C "$root" archive --format tar.gz -o "$scratch/mofi_jax.tar.gz" HEAD
  for node in "${nodes[@]}"; do
    tpus tpu-vm scp "$scratch/mofi_jax.tar.gz" "$node:mofi_jax.tar.gz" --worker all || return 1
    tpus tpu-vm ssh "$node" --worker all --command \
      'mkdir -p mofi_jax && tar -xzf mofi_jax.tar.gz -C mofi_jax' || return 1
  done
  on_all install || return 1
  [ -z "$bucket" ] || on_all mount "$bucket"
}

follow() { # prints the first host's log; sets code to the training's exit code, or "lost"
  local offset=0 size status
  if $dry; then on_first poll 0; code=0; return; fi
  local misses=0
  while :; do
    # The last line says where the log ends now and how the training stands.
    if on_first poll "$offset" >"$scratch/seen" 2>"$scratch/errors" &&
      read -r size status < <(tail -n 1 "$scratch/seen") && [[ $size =~ ^[0-9]+$ ]]; then
      misses=0
      head -c "$((size - offset))" "$scratch/seen"
      offset=$size
      case "$status" in
        running) ;;
        gone) code=137; return ;;
        *) code=$status; return ;;
      esac
    else
      misses=$((misses + 1))
      case "$(state)" in
        ACTIVE | UNKNOWN)
          [ "$misses" -lt 20 ] || { cat "$scratch/errors" >&2; fail "$name does not answer." 1; }
          ;;
        *) code=lost; return ;;
      esac
    fi
    sleep "$poll"
  done
}

finish() { # ends with the training's exit code
  if $keep || ! $owned; then
    say "$name is kept; it is deleted by:"
    dry=true delete >&2
  else
    say "deleting $name"
    delete
  fi
  exit "$1"
}

# ------------------------------------------------------------------------- the run
crashes=0 preemptions=0 first=true installed=false code=lost
while :; do
  fresh=false
  ensure_active
  ! $fresh || installed=false
  if $first && ! $fresh && on_first poll 0 2>/dev/null | tail -n 1 | grep -q ' running$'; then
    say "following the training that runs there"
    follow
  elif { $installed || install; } && on_all stop && on_all start "$@" --config.distributed=True; then
    installed=true
    follow
  else
    # A host went away meanwhile, or cannot be set up.
    code=1
    [ "$(state)" = ACTIVE ] || code=lost
  fi
  first=false
  case "$code" in
    0) say "finished after $preemptions preemptions and $crashes crashes"; finish 0 ;;
    2) say "bad input: running it again would not help"; finish 2 ;;
    75 | lost)
      preemptions=$((preemptions + 1))
      say "preempted ($preemptions): the same command again"
      ;;
    *)
      crashes=$((crashes + 1))
      say "crashed with exit code $code ($crashes of at most $max_crashes); last lines of all hosts:"
      on_all tail >&2 || true
      [ "$crashes" -le "$max_crashes" ] || finish 1
      ;;
  esac
  sleep "$poll"
done

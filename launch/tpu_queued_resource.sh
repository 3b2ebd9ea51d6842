#!/usr/bin/env bash
# Trains on one or several Cloud TPU slices, from the request for them to the last step: see --help.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # also when called by a link
# shellcheck source-path=SCRIPTDIR source=launcher.sh
. "$here/launcher.sh"

usage() {
  cat <<'TEXT'
usage: launch/tpu_queued_resource.sh [options] -- --config NAME:ARGS --workdir DIR [train flags]

Requests TPU slices as a queued resource, waits for them, installs this commit on every host, starts
`python -m mofi_jax.train` with the flags after -- on all of them and follows the log of the first.
Preempted slices are deleted and requested again, and the same command resumes the training.

  --name NAME              of the queued resource (required)
  --zone ZONE              (required)
  --accelerator-type TYPE  such as v5litepod-64, v5p-128, v6e-64 (required)
  --project PROJECT        default: that of gcloud's configuration
  --runtime-version NAME   default: by the accelerator type
  --slices N               several slices of that type (multislice); default 1
  --spot                   capacity that may be preempted at any time
  --reserved               capacity of a reservation
  --create-arg ARG         one more flag for `queued-resources create`; may be repeated
  --bucket BUCKET          mounted at /mnt/BUCKET on every host, for --workdir and the data
  --max-crashes N          give up after that many crashes; default 3 (preemptions do not count)
  --keep                   leave the slices when the run has ended: they cost money until deleted
  --poll SECONDS           between two looks at the run; default 30
  --dry-run                print the commands and run none
  --help

Slices that this command requested, now or in an earlier call, are deleted when the run has ended;
others of that name are used and kept.  Interrupted (Ctrl-C, SIGTERM), it leaves the training running
and says how to delete the slices; called again, it follows the training and deletes them at the end.
Exit code: that of the training (0 finished, 2 bad input); 1 if the slices could not be had, set up,
reached or deleted.
TEXT
}

name='' zone='' accelerator_type='' project='' runtime_version='' slices=1 bucket='' max_crashes=3
poll=30 spot=false reserved=false keep=false
parse "--name --zone --accelerator-type" \
  "--project --runtime-version --slices --bucket --max-crashes --poll" "--spot --reserved --keep" "$@"
need_name --name "$name"
need_number --slices "$slices" 1
need_number --max-crashes "$max_crashes" 0
need_number --poll "$poll" 1
! $spot || ! $reserved || fail 2 "--spot and --reserved exclude each other: choose one."
if [ -z "$runtime_version" ]; then
  case "$accelerator_type" in
    v4-*) runtime_version=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime_version=v2-alpha-tpuv5 ;;
    v6e-*) runtime_version=v2-alpha-tpuv6e ;;
    *) fail 2 "No runtime version is known for $accelerator_type: give --runtime-version." ;;
  esac
fi
need_tools gcloud
where=(--zone "$zone" --quiet)
[ -z "$project" ] || where+=(--project "$project")
resource="$name (project $project, zone $zone)"
remove=(gcloud compute tpus queued-resources delete "$name" --force "${where[@]}")

nodes=("$name")
create=(queued-resources create "$name" --node-id "$name")
if [ "$slices" -gt 1 ]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
  create=(queued-resources create "$name" --node-count "$slices" --node-prefix "$name")
fi
# By its description, a later call knows the resource for one that it may delete.
description='requested by tpu_queued_resource.sh of mofi_jax'
create+=(--accelerator-type "$accelerator_type" --runtime-version "$runtime_version"
  --description "$description")
! $spot || create+=(--spot)
! $reserved || create+=(--reserved)
create+=("${create_args[@]+"${create_args[@]}"}")

# Before anything is paid for: what could fail here.
scratch=$(mktemp -d)
git -C "$here/.." diff --quiet HEAD || say "uncommitted changes are not copied to the hosts"
git -C "$here/.." archive --format tar.gz -o "$scratch/mofi_jax.tar.gz" HEAD

# ------------------------------------------------------------------------- gcloud
tpus() { run gcloud compute tpus "$@" "${where[@]}"; }

owned=false state=
look() { # sets state: the queued resource's, NONE without one, UNKNOWN when gcloud fails
  local answer found
  left=true
  if answer=$(tpus queued-resources describe "$name" \
    --format 'value(state.state,tpu.nodeSpec[0].node.description)' 2>"$scratch/errors"); then
    IFS=$'\t' read -r state found < <(tail -n 1 <<<"$answer") # after any warnings
    [ "$found" != "$description" ] || owned=true
  elif grep -qi 'not[ _]found' "$scratch/errors"; then
    left=false state=NONE
  else
    cat "$scratch/errors" >&2
    state=UNKNOWN
  fi
}

exists() { look; [ "$state" != NONE ]; } # or may exist

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
request() {
  say "requesting $slices x $accelerator_type as $name in $zone"
  left=true fresh=true
  if tpus "${create[@]}"; then
    owned=true
  else
    exists || fail 1 "The request for $name was refused: see gcloud's error above."
  fi
}

ensure_active() { # returns when the slices are there; sets fresh to whether they were requested now
  local last='' failures=0 unknown=0
  fresh=false
  if $dry; then request; return; fi
  while :; do
    look
    [ "$state" = "$last" ] || say "$name: $state"
    last=$state
    case "$state" in
      ACTIVE) return ;;
      NONE) request; continue ;;
      SUSPENDED) # preempted: nothing but its name is left
        delete || fail 1 "The preempted $name could not be deleted."
        continue
        ;;
      FAILED)
        failures=$((failures + 1))
        tpus queued-resources describe "$name" --format 'yaml(state)' >&2 || true
        delete || fail 1 "The failed $name could not be deleted."
        [ "$failures" -lt 3 ] || fail 1 "$name failed $failures times: see its state above."
        continue
        ;;
      UNKNOWN) unknown=$((unknown + 1)) ;;
      *) unknown=0 ;;
    esac
    [ "$unknown" -lt 20 ] || fail 1 "gcloud does not tell the state of $name: see its errors above."
    sleep "$poll"
  done
}

install() { # this commit, its requirements and the bucket, on every host
  local node
  for node in "${nodes[@]}"; do
    tpus tpu-vm scp "$scratch/mofi_jax.tar.gz" "$node:mofi_jax.tar.gz" --worker all || return 1
    tpus tpu-vm ssh "$node" --worker all --command \
      'mkdir -p mofi_jax && tar -xzf mofi_jax.tar.gz -C mofi_jax' || return 1
  done
  on_all install || return 1
  [ -z "$bucket" ] || on_all mount "${bucket#gs://}"
}

follow() { # prints the first host's log; sets code to the training's exit code, or to "preempted"
  local offset=0 size status misses=0
  if $dry; then on_first poll 0; code=0; return; fi
  while :; do
    # The last line says where the log ends now and how the training stands.
    if on_first poll "$offset" >"$scratch/seen" 2>"$scratch/missed" &&
      read -r size status < <(tail -n 1 "$scratch/seen") && [[ $size =~ ^[0-9]+$ ]]; then
      misses=0
      # The log's end, as gcloud may print something before it.
      head -c "$((size - offset))" \
        < <(tail -c "$((size - offset + ${#size} + ${#status} + 3))" "$scratch/seen")
      offset=$size
      case "$status" in
        running) ;;
        gone) code=137; return ;;
        *) code=$status; return ;;
      esac
    else
      misses=$((misses + 1))
      look
      case "$state" in
        ACTIVE | UNKNOWN)
          [ "$misses" -lt 20 ] || { cat "$scratch/missed" >&2; fail 1 "$name does not answer."; }
          ;;
        *) code=preempted; return ;;
      esac
    fi
    sleep "$poll"
  done
}

finish() { # ends with that exit code, or with 1 where the deletion alone has failed
  local code=$1
  if $owned && ! $keep; then
    say "deleting $resource"
    delete || [ "$code" != 0 ] || code=1
  fi
  exit "$code"
}

# ------------------------------------------------------------------------- the run
crashes=0 preemptions=0 first=true installed=false code=''
while :; do
  ensure_active
  ! $fresh || installed=false
  if $first && ! $fresh && on_first poll 0 2>/dev/null | tail -n 1 | grep -q ' running$'; then
    say "following the training that runs there"
    follow
  elif { $installed || install; } && on_all stop &&
    on_all start "${train[@]}" --config.distributed=True; then
    installed=true
    follow
  else
    code=setup
    look
    [ "$state" = ACTIVE ] || code=preempted
  fi
  first=false
  case "$code" in
    0) say "finished after $preemptions preemptions and $crashes crashes"; finish 0 ;;
    2) say "bad input: running it again would not help"; finish 2 ;;
    75 | preempted)
      preemptions=$((preemptions + 1))
      say "preempted ($preemptions): the same command again"
      ;;
    *)
      crashes=$((crashes + 1)) failure="crashed with exit code $code"
      [ "$code" != setup ] || code=1 failure='setting up the hosts failed'
      say "$failure ($crashes of at most $max_crashes); last lines of all hosts:"
      on_all tail >&2 || true
      [ "$crashes" -le "$max_crashes" ] || finish "$code"
      ;;
  esac
  sleep "$poll"
done

#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster through xpk (the way to TPU7x): see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/xpk.sh [options] -- --config FILE:ARGS --workdir DIR [train flags]

Submits `python -m mofi_jax.train` with the flags after -- as an xpk workload and waits for its end.
The cluster restarts it after a preemption (exit code 75), a lost machine or a crash, and not after
bad input (exit code 2); restarted, it goes on from its last checkpoint.

  --workload NAME   (required)
  --cluster NAME    (required)
  --zone ZONE       (required)
  --tpu-type TYPE   such as v5litepod-64, v6e-256, tpu7x-128 (required)
  --image IMAGE     built from launch/Dockerfile with EXTRA=tpu (required)
  --project NAME    default: that of gcloud's configuration
  --slices N        default 1
  --spot            for clusters with autoprovisioning
  --max-restarts N  default 50
  --dry-run         print the commands and run none
  --help

--workdir and the data lie on a volume that the cluster mounts in every pod, for a bucket:
  xpk storage attach NAME --cluster C --project P --zone Z --type gcsfuse --bucket B --size 10000 \
      --mount-point /data --auto-mount true --readonly false \
      --mount-options implicit-dirs,rename-dir-limit=200000
xpk sends usage data unless told not to: xpk config set send-telemetry false
Exit code: 0 finished, 125 failed (xpk's), or that of xpk.
TEXT
}

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
need() { [ "$2" -ge 2 ] || fail "$1 needs a value: see --help."; }

workload='' cluster='' zone='' type='' image='' project='' slices=1 restarts=50 spot=false dry=false
while [ $# -gt 0 ]; do
  case "$1" in
    --workload) need "$1" $#; workload=$2; shift ;;
    --cluster) need "$1" $#; cluster=$2; shift ;;
    --zone) need "$1" $#; zone=$2; shift ;;
    --tpu-type) need "$1" $#; type=$2; shift ;;
    --image) need "$1" $#; image=$2; shift ;;
    --project) need "$1" $#; project=$2; shift ;;
    --slices) need "$1" $#; slices=$2; shift ;;
    --max-restarts) need "$1" $#; restarts=$2; shift ;;
    --spot) spot=true ;;
    --dry-run) dry=true ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "Unknown option $1: see --help; flags of the training come after --." ;;
  esac
  shift
done
[ -n "$workload" ] || fail "--workload is missing: see --help."
[ -n "$cluster" ] || fail "--cluster is missing: see --help."
[ -n "$zone" ] || fail "--zone is missing: see --help."
[ -n "$type" ] || fail "--tpu-type is missing: see --help."
[ -n "$image" ] || fail "--image is missing: see --help."
[[ " $* " == *" --config"* ]] || fail "No --config after --: see --help."
[[ " $* " == *" --workdir"* ]] || fail "No --workdir after --: see --help."

where=(--cluster "$cluster" --zone "$zone")
[ -z "$project" ] || where+=(--project "$project")
run() {
  if $dry; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# exec: the training itself hears the signal of a preemption, and its exit code is the pod's.
command="exec python -m mofi_jax.train $(printf "%q " "$@")--config.distributed=True"
# By default xpk restarts on 42 and 127 to 255; 1 is a crash, 75 a preemption that was saved.
create=(xpk workload create --workload "$workload" "${where[@]}" --tpu-type "$type"
  --num-slices "$slices" --docker-image "$image" --max-restarts "$restarts"
  --restart-on-exit-codes '1,75' --termination-grace-period-seconds 300 --command "$command")
! $spot || create+=(--spot)
run "${create[@]}"
run xpk workload list "${where[@]}" --wait-for-job-completion "$workload"

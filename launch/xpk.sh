#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster through xpk (the way to TPU7x): see --help.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # also when called by a link
# shellcheck source-path=SCRIPTDIR source=launcher.sh
. "$here/launcher.sh"

usage() {
  cat <<'TEXT'
usage: launch/xpk.sh [options] -- --config NAME:ARGS --workdir DIR [train flags]

Submits `python -m mofi_jax.train` with the flags after -- as an xpk workload and waits for its end.
The cluster restarts it after a preemption (exit code 75), a lost machine or a crash, and not after
bad input (exit code 2); restarted, it resumes from its last checkpoint.

  --workload NAME   (required)
  --cluster NAME    (required)
  --zone ZONE       (required)
  --tpu-type TYPE   such as v5litepod-64, v6e-256, tpu7x-128 (required)
  --image IMAGE     built from launch/Dockerfile with EXTRA=tpu (required)
  --project NAME    default: that of gcloud's configuration
  --slices N        default 1
  --spot            for clusters with autoprovisioning
  --max-restarts N  default 50
  --create-arg ARG  one more flag for `xpk workload create`; may be repeated
  --dry-run         print the commands and run none
  --help

Interrupted (Ctrl-C, SIGTERM), it leaves the workload running and says how to delete it; called
again, it waits for that workload.  A finished workload of the same name holds no machines and is
replaced.
--workdir and the data lie on a volume that the cluster mounts in every pod, for a bucket:
  xpk storage attach NAME --cluster C --project P --zone Z --type gcsfuse --bucket B --size 10000 \
      --mount-point /data --auto-mount true --readonly false \
      --mount-options implicit-dirs,rename-dir-limit=200000
xpk sends usage data unless told not to: xpk config set send-telemetry false
Exit code: 0 finished, 125 failed (xpk's), or that of xpk.
TEXT
}

workload='' cluster='' zone='' tpu_type='' image='' project='' slices=1 max_restarts=50 spot=false
parse "--workload --cluster --zone --tpu-type --image" "--project --slices --max-restarts" "--spot" "$@"
need_name --workload "$workload"
need_number --slices "$slices" 1
need_number --max-restarts "$max_restarts" 0
need_tools gcloud xpk
where=(--cluster "$cluster" --zone "$zone")
[ -z "$project" ] || where+=(--project "$project")
resource="workload $workload (cluster $cluster, project $project, zone $zone)"
remove=(xpk workload delete --workload "$workload" "${where[@]}")

listed() { # STATUS: whether the workload is among those of that status
  local rows
  rows=$(xpk workload list "${where[@]}" --filter-by-job "$workload" --filter-by-status "$1") || {
    printf '%s\n' "$rows" >&2 # xpk writes its errors there
    fail 1 "xpk cannot list the workloads of $cluster: see its errors above."
  }
  grep -q "^$workload " <<<"$rows"
}
exists() { listed EVERYTHING; }

# exec: the training itself hears the signal of a preemption, and its exit code is the pod's.
command="exec python -m mofi_jax.train $(printf "%q " "${train[@]}")--config.distributed=True"
# By default xpk restarts on 42 and 127 to 255; 1 is a crash, 75 a preemption after a checkpoint.
create=(xpk workload create --workload "$workload" "${where[@]}" --tpu-type "$tpu_type"
  --num-slices "$slices" --docker-image "$image" --max-restarts "$max_restarts"
  --restart-on-exit-codes '1,75' --termination-grace-period-seconds 300 --command "$command")
! $spot || create+=(--spot)
create+=("${create_args[@]+"${create_args[@]}"}")

left=true
if ! $dry && listed FINISHED; then
  say "deleting the finished $resource"
  delete || fail 1 "The finished workload $workload could not be deleted."
fi
if ! $dry && exists; then
  say "waiting for the $resource that is there"
else
  left=true
  run "${create[@]}" || {
    code=$?
    exists || left=false
    exit "$code"
  }
fi
code=0
run xpk workload list "${where[@]}" --wait-for-job-completion "$workload" || code=$?
case "$code" in 0 | 125) left=false ;; esac # finished: no machine runs for it
exit "$code"

#!/usr/bin/env bash
# What tpu_queued_resource.sh runs on each TPU host, in the home folder that holds mofi_jax/.
#
#   install            Python 3.12 and the requirements, in mofi_venv/
#   mount BUCKET       the bucket at /mnt/BUCKET
#   start FLAGS...     the training, in the background: mofi_log, mofi_pid, at its end mofi_exit
#   poll OFFSET        the log from that byte on, then a line "BYTES running|gone|EXIT_CODE"
#   stop               ends a training that still runs
#   tail               the last lines of the log
set -euo pipefail
cd ~

alive() { [ -f mofi_pid ] && kill -0 -- "-$(cat mofi_pid)" 2>/dev/null; }

command=$1
shift
case "$command" in
  install)
    # TPU images come with Python 3.10; uv brings a newer one without touching the system's.  The
    # variable lets pip install for this user alone also on images that forbid it (PEP 668).
    [ -x .local/bin/uv ] ||
      PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    [ -x mofi_venv/bin/python ] || .local/bin/uv venv --quiet --python 3.12 mofi_venv
    .local/bin/uv pip install --quiet --python mofi_venv/bin/python \
      -r mofi_jax/requirements.txt 'jax[tpu]'
    ;;
  mount)
    if ! command -v gcsfuse >/dev/null; then
      keyring=/usr/share/keyrings/cloud.google.asc
      packages=https://packages.cloud.google.com/apt
      curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$keyring" >/dev/null
      echo "deb [signed-by=$keyring] $packages gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      sudo apt-get -qq update
      sudo apt-get -qq install -y gcsfuse
    fi
    if ! mountpoint -q "/mnt/$1"; then
      sudo mkdir -p "/mnt/$1"
      sudo chown "$(id -un)" "/mnt/$1"
      # A checkpoint is committed by renaming its folder, which gcsfuse refuses in a bucket without
      # hierarchical namespace unless it may rename that many files.
      gcsfuse --implicit-dirs --rename-dir-limit 200000 "$1" "/mnt/$1"
    fi
    ;;
  start)
    rm -f mofi_exit
    : >mofi_log
    # In a session of its own it outlives the connection and can be ended with all its processes.
    # shellcheck disable=SC2016  # the inner shell expands them
    setsid nohup bash -c '
      cd mofi_jax
      code=0
      ../mofi_venv/bin/python -m mofi_jax.train "$@" || code=$?
      echo "$code" >../mofi_exit.part
      mv ../mofi_exit.part ../mofi_exit
    ' train "$@" >>mofi_log 2>&1 </dev/null &
    echo $! >mofi_pid
    # Before the session exists, `poll` would find no process and report a crash.
    for _ in $(seq 100); do
      if alive || [ -f mofi_exit ]; then break; fi
      sleep 0.1
    done
    ;;
  poll)
    # The exit code before the log, which is then complete.
    if [ -f mofi_exit ]; then
      status=$(cat mofi_exit)
    elif alive; then
      status=running
    elif [ -f mofi_exit ]; then # it ended between the two checks
      status=$(cat mofi_exit)
    else
      status=gone
    fi
    size=0
    if [ -f mofi_log ]; then
      size=$(stat -c %s mofi_log)
      tail -c "+$(($1 + 1))" mofi_log | head -c "$((size - $1))"
    fi
    printf '\n%s %s\n' "$size" "$status"
    ;;
  stop)
    if alive; then
      group=$(cat mofi_pid)
      kill -TERM -- "-$group"
      for _ in $(seq 300); do # a minute for its checkpoint
        alive || break
        sleep 0.2
      done
      if alive; then kill -KILL -- "-$group"; fi
    fi
    rm -f mofi_pid
    ;;
  tail)
    echo "--- $(hostname)"
    if [ -f mofi_log ]; then tail -n 20 mofi_log; fi
    ;;
  *)
    echo "error: unknown command $command" >&2
    exit 2
    ;;
esac

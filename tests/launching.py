"""Stand-ins for gcloud, xpk, srun and scontrol that record their calls and fail on demand.

Launch scripts see a PATH of these and of named system tools alone, so that they cannot reach a real
cloud command.  The stand-in of gcloud really runs what it is asked to run on "hosts", each a home
folder of its own.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import textwrap
from collections.abc import Iterator

REPOSITORY = pathlib.Path(__file__).parent.parent
LAUNCH = REPOSITORY / "launch"
TRAIN = ("--config", "configs/mofi.py:variant=H/14", "--workdir", "/mnt/my bucket/run")
TOOLS = (
    *("basename", "bash", "cat", "chmod", "cp", "dirname", "env", "git", "grep", "gzip", "head"),
    *("hostname", "id", "ln", "mkdir", "mktemp", "mv", "nohup", "printf", "readlink", "rm", "sed"),
    *("seq", "setsid", "stat", "tail", "tar", "touch", "tr", "xargs"),
)

# Begins every stand-in.  Each call of a verb takes a line off faults/VERB: "ok", an error, or the
# name of a signal that the calling script gets; after "late" either comes when the work is done.
RECORD = """
    #!/usr/bin/env bash
    record() { { printf '%s\\x1f' "$(basename "$0")" "$@"; echo; } >>"$FAKE/calls"; }
    late=''
    fault() { # VERB
      [ -s "$FAKE/faults/$1" ] || return 0
      local line
      line=$(head -n 1 "$FAKE/faults/$1")
      sed -i 1d "$FAKE/faults/$1"
      case "$line" in
        ok) ;;
        late*) late=${line#late } ;;
        *) fail "$line" ;;
      esac
    }
    fail() {
      case "$1" in
        INT | TERM | HUP) kill "-$1" "$PPID" ;;
        *) echo "ERROR: $1" >&2 ;;
      esac
      exit 1
    }
    finish() { [ -z "$late" ] || fail "$late"; exit 0; }
    option() { # NAME ARGUMENTS...: prints its value
      local name=$1
      while shift; do [ "$1" != "$name" ] || { printf '%s' "$2"; return; }; done
    }
"""
# A queued resource is a file with its state, a host a folder.
GCLOUD = """
    if [ "$1" = config ]; then cat "$FAKE/project"; exit; fi
    record "$@"
    case "$*" in "compute tpus "*" --zone z "*) ;; *) fail "no such command: $*" ;; esac
    fault "$4"
    case "$3 $4" in
      'queued-resources create')
        [ ! -e "$FAKE/state" ] || fail ALREADY_EXISTS
        printf WAITING_FOR_RESOURCES >"$FAKE/state"
        option --description "$@" >"$FAKE/description"
        rm -rf "$FAKE/hosts" ;;
      'queued-resources describe')
        [ -e "$FAKE/state" ] || fail "NOT_FOUND: Resource was not found"
        cat "$FAKE/state"
        case "$(option --format "$@")" in
          *,tpu.nodeSpec*.node.description*) printf '\\t%s\\n' "$(cat "$FAKE/description")" ;;
        esac
        case "$(cat "$FAKE/state")" in
          WAITING_FOR_RESOURCES) cat "$FAKE/granted" >"$FAKE/state" ;;
          SUSPENDING) printf SUSPENDED >"$FAKE/state" ;;
        esac ;;
      'queued-resources delete')
        [ -e "$FAKE/state" ] || fail "NOT_FOUND: Resource was not found"
        rm "$FAKE/state" ;;
      'tpu-vm ssh' | 'tpu-vm scp')
        grep -qs ACTIVE "$FAKE/state" || fail "the instance is not running"
        workers=$(option --worker "$@")
        for number in ${workers/all/0 1}; do
          node=$5
          [ "$4" = ssh ] || node=${6%%:*}
          home=$FAKE/hosts/$node.$number
          mkdir -p "$home"
          if [ "$4" = scp ]; then cp "$5" "$home/${6#*:}"; continue; fi
          (cd "$home" && HOME=$home exec bash -c "$(option --command "$@")") || exit
        done ;;
    esac
    finish
"""
# The workload is a file with its status.
XPK = """
    record "$@"
    verb=$2
    [ -z "$(option --wait-for-job-completion "$@")" ] || verb=wait
    fault "$verb"
    case "$verb" in
      create) echo RUNNING >"$FAKE/workload" ;;
      delete) rm "$FAKE/workload" ;;
      list)
        echo "[XPK] Workload List Output:"
        echo "Jobset Name   Created Time"
        echo "other-w   2026-01-01"
        case "$(option --filter-by-status "$@") $(cat "$FAKE/workload" 2>/dev/null)" in
          "EVERYTHING "?* | "FINISHED FINISHED") echo "w             2026-01-01" ;;
        esac ;;
      wait) code=$(cat "$FAKE/plan"); echo FINISHED >"$FAKE/workload"; exit "$code" ;;
    esac
    finish
"""
SRUN = """
    record "$@"
    echo "${JAX_LOCAL_DEVICE_IDS:-unset}" >"$FAKE/devices"
    action=$(head -n 1 "$FAKE/plan")
    sed -i 1d "$FAKE/plan"
    case "$action" in
      exit*) exit "${action#exit }" ;;
      saving)  # a training that needs a moment to save when it is preempted
        trap 'sleep 1; record saved; exit 75' TERM
        touch "$FAKE/running"
        while :; do sleep 1; done ;;
    esac
"""
# `python3 -m pip install uv` brings a uv whose environments hold the stand-in of the training.
PYTHON3 = """
    record "$@"
    fault pip
    mkdir -p .local/bin
    cp "$FAKE/bin/uv" .local/bin/uv
"""
UV = """
    echo "uv $*" >>uv_calls
    if [ "$1" = venv ]; then
      mkdir -p mofi_venv/bin
      cp "$FAKE/bin/training" mofi_venv/bin/python
    fi
"""
# The first host acts out the next line of the plan, the others end.
TRAINING = """
    printf '%s\\n' "$@" >"$HOME/arguments"
    echo "in $(basename "$PWD")"
    case "$HOME" in *.0) ;; *) exit 1 ;; esac
    action=$(head -n 1 "$FAKE/plan")
    sed -i 1d "$FAKE/plan"
    echo "started: $action"
    case "$action" in
      exit*) exit "${action#exit }" ;;
      preempted) printf SUSPENDING >"$FAKE/state"; sleep 1000 ;;
      killed)
        until [ -s "$HOME/mofi_pid" ]; do :; done
        kill -KILL -- "-$(cat "$HOME/mofi_pid")" ;;
      slow) until [ -e "$FAKE/go" ]; do sleep 1; done; echo "slow is done" ;;
    esac
"""
RECORDED = 'record "$@"\nfault "$(basename "$0")"\nfinish\n'
# Nobody waits as long as asked; 30 seconds are a launcher's pause.
SLEEP = f"""
    [ "$1" != 30 ] || fault sleep
    exec {shutil.which("sleep")} 0.01
"""


def executable(path: pathlib.Path, text: str) -> None:
    path.write_text(textwrap.dedent(RECORD).lstrip() + textwrap.dedent(text))
    path.chmod(0o755)


def stand_ins(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes FOLDER/fake with all stand-ins in bin/ and FOLDER/repository with launch/ in it."""
    fake = folder / "fake"
    (fake / "bin").mkdir(parents=True)
    (fake / "faults").mkdir()
    for tool in TOOLS:
        (fake / "bin" / tool).symlink_to(shutil.which(tool))
    tools = {"gcloud": GCLOUD, "xpk": XPK, "srun": SRUN, "python3": PYTHON3, "uv": UV}
    tools |= {
        "training": TRAINING,
        "scontrol": RECORDED,
        "sbatch": RECORDED,
        "curl": RECORDED,
        "sleep": SLEEP,
    }
    for name, text in tools.items():
        executable(fake / "bin" / name, text)
    (fake / "granted").write_text("ACTIVE")
    (fake / "project").write_text("p\n")
    # A repository with these very files: what is not committed does not travel.
    copy = folder / "repository"
    shutil.copytree(LAUNCH, copy / "launch")
    (copy / "requirements.txt").write_text("")
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-C", str(copy))
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "t")):
        subprocess.run([*git, *command], check=True)
    yield fake
    for path in fake.glob("hosts/*/mofi_pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)


def environment(fake: pathlib.Path) -> dict[str, str]:
    found = shutil.which("gcloud", path=str(fake / "bin"))
    assert found in (None, str(fake / "bin/gcloud"))  # never a real one
    return {"PATH": str(fake / "bin"), "FAKE": str(fake), "HOME": str(fake)}


def start(fake: pathlib.Path, command: list, **options) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env=environment(fake) | options.pop("env", {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ignored where the tests themselves run in the background, and bash would keep it so.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def run(fake: pathlib.Path, command: list, **options) -> subprocess.CompletedProcess[str]:
    process = start(fake, command, **options)
    try:
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def plan(fake: pathlib.Path, *lines: str) -> None:
    """What the trainings do, one line a start."""
    (fake / "plan").write_text("".join(f"{line}\n" for line in lines))


def faults(fake: pathlib.Path, verb: str, *lines: str) -> None:
    (fake / "faults" / verb).write_text("".join(f"{line}\n" for line in lines))


def calls(fake: pathlib.Path, *words: str) -> list[list[str]]:
    """Recorded calls, each a list of words, whose first words after the tool these are."""
    path = fake / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    every = [line.split("\x1f")[:-1] for line in lines]
    return [call for call in every if call[1 : 1 + len(words)] == list(words)]


def queued(fake: pathlib.Path, verb: str) -> list[list[str]]:
    return calls(fake, "compute", "tpus", "queued-resources", verb)


def assert_named(fake: pathlib.Path, errors: str, resource: str, state: str) -> None:
    """A script ended with the resource's name and a command that really deletes it."""
    *_, name, line, command = errors.splitlines()
    assert name == f"[launch] {resource} may still be running and costs money until it is deleted."
    assert line == "[launch] The same command as before goes on with it; this one deletes it:"
    assert (fake / state).exists()
    shutil.rmtree(fake / "faults")
    run(fake, ["bash", "-c", command])
    assert not (fake / state).exists()

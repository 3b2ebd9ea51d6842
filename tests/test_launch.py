"""Launch scripts against stand-ins for gcloud, xpk, srun and scontrol that record and fail.

The scripts see a PATH of stand-ins and named system tools alone, so that no real cloud command can
be reached from here.  The stand-in of gcloud really runs what it is asked to run on "hosts", each a
home folder of its own.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

REPOSITORY = pathlib.Path(__file__).parent.parent
LAUNCH = REPOSITORY / "launch"
TRAIN = ("--config", "configs/mofi.py:variant=H/14", "--workdir", "/mnt/my bucket/run")
TOOLS = (
    *("bash", "cat", "chmod", "chown", "cp", "dirname", "env", "git", "grep", "gzip", "head"),
    *("hostname", "id", "mkdir", "mktemp", "mv", "nohup", "rm", "sed", "seq", "setsid"),
    *("stat", "tail", "tar", "touch", "wc"),
)

# Answers as gcloud does; a queued resource is a file with its state, a host a folder.
GCLOUD = """
    import json, os, pathlib, shutil, subprocess, sys
    fake = pathlib.Path(os.environ["FAKE"])
    words = sys.argv[1:]
    with open(fake / "calls", "a") as file:
        file.write(json.dumps(words) + "\\n")
    assert words[:2] == ["compute", "tpus"] and "--zone" in words, words
    state = fake / "state"
    match words[2:4]:
        case ["queued-resources", "create"]:
            state.write_text("WAITING_FOR_RESOURCES")
            shutil.rmtree(fake / "hosts", ignore_errors=True)
        case ["queued-resources", "describe"]:
            if not state.exists():
                sys.exit("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found")
            print(state.read_text())
            if state.read_text() == "WAITING_FOR_RESOURCES":
                state.write_text((fake / "granted").read_text())
        case ["queued-resources", "delete"]:
            state.unlink()
        case ["tpu-vm", "ssh" | "scp"]:
            if not state.exists() or state.read_text() != "ACTIVE":
                sys.exit("ERROR: the instance is not running")
            worker = words[words.index("--worker") + 1]
            for number in (0, 1) if worker == "all" else (int(worker),):
                node = words[5].partition(":")[0] if words[3] == "scp" else words[4]
                home = fake / "hosts" / f"{node}.{number}"
                home.mkdir(parents=True, exist_ok=True)
                if words[3] == "scp":
                    shutil.copy(words[4], home / words[5].partition(":")[2])
                    continue
                command = words[words.index("--command") + 1]
                done = subprocess.run(
                    ["bash", "-c", command], cwd=home, env={**os.environ, "HOME": str(home)}
                )
                if done.returncode:
                    sys.exit(done.returncode)
        case other:
            sys.exit(f"unknown command {other}")
"""
# `python3 -m pip install uv` brings a uv whose environments hold the stand-in of the training.
PYTHON3 = """
    #!/usr/bin/env bash
    mkdir -p .local/bin
    cp "$FAKE/bin/uv" .local/bin/uv
"""
UV = """
    #!/usr/bin/env bash
    echo "uv $*" >>uv_calls
    if [ "$1" = venv ]; then
      mkdir -p mofi_venv/bin
      cp "$FAKE/bin/training" mofi_venv/bin/python
    fi
"""
# The first host acts out the next line of the plan, the others end.
TRAINING = """
    #!/usr/bin/env bash
    printf '%s\\n' "$@" >"$HOME/arguments"
    echo "in $(basename "$PWD")"
    case "$HOME" in *.0) ;; *) sleep 0.2; exit 1 ;; esac
    action=$(head -n 1 "$FAKE/plan")
    sed -i 1d "$FAKE/plan"
    echo "started: $action"
    case "$action" in
      exit*) exit "${action#exit }" ;;
      preempted) printf SUSPENDED >"$FAKE/state"; sleep 2 ;;
      killed) kill -KILL -- "-$(cat "$HOME/mofi_pid")" ;;
      slow) until [ -e "$FAKE/go" ]; do sleep 0.05; done; echo "slow is done" ;;
    esac
"""


def executable(path, text):
    text = textwrap.dedent(text).lstrip()
    if not text.startswith("#!"):
        text = f"#!{sys.executable} -IS\n{text}"
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def fake(tmp_path):
    """Folder of the stand-ins; its bin/ is all that the scripts find."""
    folder = tmp_path / "fake"
    (folder / "bin").mkdir(parents=True)
    for tool in (*TOOLS, "basename", "tr", "ln"):
        (folder / "bin" / tool).symlink_to(shutil.which(tool))
    executable(folder / "bin/sleep", f"#!/bin/sh\nexec {shutil.which('sleep')} 0.02\n")
    executable(folder / "bin/gcloud", GCLOUD)
    executable(folder / "bin/python3", PYTHON3)
    executable(folder / "bin/uv", UV)
    executable(folder / "bin/training", TRAINING)
    (folder / "granted").write_text("ACTIVE")
    # A repository with these very files: what is not committed does not travel.
    copy = tmp_path / "repository"
    shutil.copytree(LAUNCH, copy / "launch")
    (copy / "requirements.txt").write_text("")
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-C", str(copy))
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "t")):
        subprocess.run([*git, *command], check=True)
    yield folder
    for path in folder.glob("hosts/*/mofi_pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)


def environment(fake):
    found = shutil.which("gcloud", path=str(fake / "bin"))
    assert found == str(fake / "bin/gcloud")  # never a real one
    return {"PATH": str(fake / "bin"), "FAKE": str(fake), "HOME": str(fake)}


def calls(fake):
    path = fake / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def count(fake, *words):
    return sum(call[2 : 2 + len(words)] == list(words) for call in calls(fake))


OPTIONS = ("--name", "pod", "--zone", "z", "--accelerator-type", "v5litepod-16", "--poll", "0.1")


def queued(fake, *options, plan=(), train=TRAIN):
    (fake / "plan").write_text("".join(f"{line}\n" for line in plan))
    return subprocess.run(
        [
            fake.parent / "repository/launch/tpu_queued_resource.sh",
            *OPTIONS,
            *options,
            "--",
            *train,
        ],
        env=environment(fake),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ------------------------------------------------------------------------- queued resources


def launcher(fake):
    return fake.parent / "repository/launch/tpu_queued_resource.sh"


def test_queued_resource_is_asked_for_trained_on_and_deleted(fake):
    done = queued(fake, "--spot", plan=["exit 0"])
    assert done.returncode == 0, done.stderr
    [create] = [call for call in calls(fake) if call[3] == "create"]
    wanted = (
        "--node-id pod --accelerator-type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite",
    )
    assert wanted[0] in " ".join(create)
    assert "--spot" in create
    for host in ("pod.0", "pod.1"):
        home = fake / "hosts" / host
        # Every host got the flags unharmed, and runs from the repository's root.
        arguments = (home / "arguments").read_text().splitlines()
        assert arguments == ["-m", "mofi_jax.train", *TRAIN, "--config.distributed=True"]
        assert "jax[tpu]" in (home / "uv_calls").read_text()
    assert done.stdout == "in mofi_jax\nstarted: exit 0\n"  # the log, no byte more or less
    assert count(fake, "queued-resources", "delete") == 1
    assert not (fake / "state").exists()


def test_preemption_with_and_without_a_save_runs_the_same_command_again(fake):
    done = queued(fake, plan=["exit 75", "preempted", "exit 75", "exit 0"])
    assert done.returncode == 0, done.stderr
    assert "finished after 3 preemptions and 0 crashes" in done.stderr
    # Only the lost slice was asked for anew; what is installed on the other is used again.
    assert count(fake, "queued-resources", "create") == 2
    assert count(fake, "tpu-vm", "scp") == 2
    assert (fake / "plan").read_text() == ""


def test_crashes_are_bounded_and_show_all_hosts(fake):
    done = queued(fake, "--max-crashes", "2", plan=["exit 1", "killed", "exit 134"])
    assert done.returncode == 1
    assert "crashed with exit code 137 (2 of at most 2)" in done.stderr
    assert "crashed with exit code 134 (3 of at most 2)" in done.stderr
    assert (fake / "plan").read_text() == ""
    assert done.stderr.count("---") >= 6  # two hosts, three times
    assert not (fake / "state").exists()  # nothing goes on costing money


def test_bad_input_is_not_tried_again(fake):
    done = queued(fake, plan=["exit 2", "exit 0"])
    assert done.returncode == 2
    assert (fake / "plan").read_text() == "exit 0\n"


def test_slices_that_were_there_are_used_and_kept(fake):
    (fake / "state").write_text("ACTIVE")
    done = queued(fake, plan=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert count(fake, "queued-resources", "create") == 0
    assert count(fake, "queued-resources", "delete") == 0
    assert "gcloud compute tpus queued-resources delete pod --force --zone z" in done.stderr


def test_a_second_call_follows_the_training_that_runs(fake):
    (fake / "state").write_text("ACTIVE")
    (fake / "plan").write_text("slow\n")

    def start():
        return subprocess.Popen(
            [launcher(fake), *OPTIONS, "--", *TRAIN],
            env=environment(fake),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = start()
    wait_for(lambda: (fake / "hosts/pod.0/arguments").exists())
    first.kill()
    first.communicate()
    second = start()
    lines = iter(second.stderr.readline, "")
    assert any("following the training that runs there" in line for line in lines)
    (fake / "go").touch()
    output, _ = second.communicate(timeout=30)
    assert second.returncode == 0
    assert output == "in mofi_jax\nstarted: slow\nslow is done\n"  # from its beginning


def test_a_training_that_is_left_over_is_ended(fake):
    """Its process group, workers of the data included, and nothing else."""
    (fake / "state").write_text("ACTIVE")
    assert queued(fake, plan=["exit 0"]).returncode == 0
    (fake / "plan").write_text("slow\n")
    home = fake / "hosts/pod.0"
    host = ["bash", home / "mofi_jax/launch/tpu_host.sh"]
    env = {**environment(fake), "HOME": str(home)}
    subprocess.run([*host, "start"], env=env, check=True)
    group = int((home / "mofi_pid").read_text())
    os.killpg(group, 0)
    subprocess.run([*host, "stop"], env=env, check=True, timeout=20)
    assert not (home / "mofi_pid").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def test_failed_request_is_tried_three_times(fake):
    (fake / "granted").write_text("FAILED")
    done = queued(fake)
    assert done.returncode == 1
    assert "pod failed 3 times" in done.stderr
    assert count(fake, "queued-resources", "create") == 3


def test_several_slices(fake):
    done = queued(fake, "--slices", "2", plan=["exit 0", "exit 0"])
    assert done.returncode == 0, done.stderr
    [create] = [call for call in calls(fake) if call[3] == "create"]
    assert "--node-count 2 --node-prefix pod" in " ".join(create)
    hosts = sorted(path.parent.name for path in (fake / "hosts").glob("*/arguments"))
    assert hosts == ["pod-0.0", "pod-0.1", "pod-1.0", "pod-1.1"]


def test_dry_run_prints_commands_that_a_shell_reads_back(fake):
    done = queued(fake, "--dry-run", "--bucket", "gs://my-bucket")
    assert done.returncode == 0, done.stderr
    assert calls(fake) == []
    lines = done.stdout.splitlines()
    assert all(line.startswith("gcloud compute tpus ") for line in lines)
    assert any("mount\\ my-bucket" in line for line in lines)
    # What is printed does what it says: run by a shell, it is the very call.
    start = next(line for line in lines if "start\\ " in line)
    subprocess.run(["bash", "-c", start], env=environment(fake), check=False, capture_output=True)
    command = calls(fake)[0][calls(fake)[0].index("--command") + 1]
    words = subprocess.run(
        ["bash", "-c", f'printf "%s\\n" {command}'], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words[2:] == ["start", *TRAIN, "--config.distributed=True"]


@pytest.mark.parametrize(
    ("options", "train", "sentence"),
    [
        (("--zone",), TRAIN, "Unknown option"),
        (("--speed", "9"), TRAIN, "Unknown option --speed"),
        (("--slices", "0"), TRAIN, "--slices=0"),
        (("--spot", "--reserved"), TRAIN, "exclude each other"),
        (("--accelerator-type", "v9-8"), TRAIN, "No runtime version is known for v9-8"),
        ((), ("--workdir", "w"), "No --config"),
        ((), ("--config", "c"), "No --workdir"),
    ],
)
def test_queued_resource_refuses_in_one_sentence(fake, options, train, sentence):
    done = queued(fake, *options, train=train)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr or options == ("--zone",)
    assert len(done.stderr.splitlines()) == 1
    assert calls(fake) == []


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------- xpk


@pytest.mark.parametrize("code", [0, 125])
def test_xpk_submits_waits_and_tells_the_end(fake, code):
    script = f"""
        import json, os, pathlib, sys
        with open(pathlib.Path(os.environ["FAKE"]) / "calls", "a") as file:
            file.write(json.dumps(sys.argv[1:]) + "\\n")
        sys.exit({code} if "--wait-for-job-completion" in sys.argv else 0)
    """
    executable(fake / "bin/xpk", script)
    options = "--workload w --cluster c --zone z --tpu-type v6e-256 --slices 2 --image i --spot"
    done = subprocess.run(
        [LAUNCH / "xpk.sh", *options.split(), "--", *TRAIN],
        env=environment(fake),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    create, wait = calls(fake)
    assert create[:2] == ["workload", "create"]
    flags = dict(zip(create[2:-1:2], create[3:-1:2], strict=True))
    codes = flags["--restart-on-exit-codes"].split(",")
    assert "75" in codes
    assert "2" not in codes
    assert int(flags["--max-restarts"]) > 0
    words = subprocess.run(
        ["bash", "-c", f'exec() {{ printf "%s\\n" "$@"; }}; {flags["--command"]}'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert words == ["python", "-m", "mofi_jax.train", *TRAIN, "--config.distributed=True"]
    assert wait[:2] == ["workload", "list"]


# ------------------------------------------------------------------------- SLURM

SRUN = """
    #!/usr/bin/env bash
    printf '%s\\n' "$*" "devices ${JAX_LOCAL_DEVICE_IDS:-unset}" >>"$FAKE/srun"
    action=$(head -n 1 "$FAKE/plan")
    sed -i 1d "$FAKE/plan"
    case "$action" in
      exit*) exit "${action#exit }" ;;
      saving)  # a training that needs a moment to save when it is told to leave
        trap 'sleep 0.3; echo saved >>"$FAKE/srun"; exit 75' TERM
        touch "$FAKE/running"
        while :; do sleep 0.05; done ;;
    esac
"""
SCONTROL = """
    #!/usr/bin/env bash
    echo "scontrol $*" >>"$FAKE/srun"
"""


def slurm(fake, plan, **extra):
    executable(fake / "bin/srun", SRUN)
    executable(fake / "bin/scontrol", SCONTROL)
    (fake / "plan").write_text("".join(f"{line}\n" for line in plan))
    env = {
        "SLURM_SUBMIT_DIR": str(fake),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "96",
        "PYTHON": "python3",
    }
    return subprocess.Popen(
        ["bash", LAUNCH / "slurm_gpu.sbatch", *TRAIN],
        env={**environment(fake), **env, **extra},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def srun_lines(fake):
    return (fake / "srun").read_text().splitlines()


def test_slurm_starts_one_process_a_node_with_all_gpus(fake):
    job = slurm(fake, ["exit 0"])
    assert job.wait(20) == 0
    command, devices = srun_lines(fake)
    assert command.endswith(" ".join(["-m", "mofi_jax.train", *TRAIN, "--config.distributed=True"]))
    assert "--kill-on-bad-exit=0" in command
    assert "--cpus-per-task=96" in command
    assert devices == "devices 0,1,2,3,4,5,6,7"


def test_slurm_alone_on_a_node_needs_no_cluster(fake):
    assert slurm(fake, ["exit 0"], SLURM_JOB_NUM_NODES="1").wait(20) == 0
    command, devices = srun_lines(fake)
    assert "distributed" not in command
    assert devices == "devices unset"


def test_slurm_end_of_time_saves_and_requeues(fake):
    job = slurm(fake, ["saving"])
    wait_for((fake / "running").exists)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75
    assert srun_lines(fake)[2:] == ["saved", "scontrol requeue 77"]


def test_slurm_preemption_requeues_crash_tries_again_bad_input_ends(fake):
    assert slurm(fake, ["exit 1", "exit 137", "exit 75"]).wait(20) == 75
    assert srun_lines(fake)[-1] == "scontrol requeue 77"
    (fake / "srun").unlink()
    assert slurm(fake, ["exit 139"] * 5).wait(20) == 139
    assert sum("mofi_jax.train" in line for line in srun_lines(fake)) == 4
    (fake / "srun").unlink()
    assert slurm(fake, ["exit 2", "exit 0"]).wait(20) == 2
    assert not any("scontrol" in line for line in srun_lines(fake))


def test_slurm_array_is_a_sweep(fake):
    extra = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_JOB_NUM_NODES": "1"}
    assert slurm(fake, ["exit 0"], **extra).wait(20) == 0
    assert srun_lines(fake)[0].endswith(" ".join(["-m", "mofi_jax.sweep", *TRAIN, "--index=5"]))


def test_slurm_asks_to_be_told_early_and_to_keep_its_log():
    text = (LAUNCH / "slurm_gpu.sbatch").read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert directives["signal"] == "B:TERM@300"
    assert directives["ntasks-per-node"] == "1"
    assert {"requeue", "open-mode"} <= directives.keys()


def test_jax_under_slurm_takes_the_devices_that_it_is_told():
    """Without JAX_LOCAL_DEVICE_IDS jax gives a process the one GPU of its local number."""
    code = """
        import os, socket
        import jax
        with socket.socket() as sock:
            sock.bind(("localhost", 0))
            os.environ["JAX_COORDINATOR_PORT"] = str(sock.getsockname()[1])
        jax.distributed.initialize()
        print(jax.config.values["jax_cuda_visible_devices"], jax.process_count())
    """
    env = {
        **os.environ,
        **{"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "1"},
        **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "JAX_PLATFORMS": "cpu"},
    }
    for ids, expected in (({"JAX_LOCAL_DEVICE_IDS": "0,1,2"}, "0,1,2 1"), ({}, "0 1")):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**env, **ids},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout.strip() == expected, done.stderr


# ------------------------------------------------------------------------- SkyPilot, Docker, lint


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_skypilot_recovers_from_preemption_and_runs_on_all_nodes(fake, kind):
    task = yaml.safe_load((LAUNCH / f"skypilot_{kind}.yaml").read_text())
    resources = task["resources"]
    assert resources["use_spot"] is True
    assert resources["job_recovery"]["recover_on_exit_codes"] == [os.EX_TEMPFAIL]
    assert resources["job_recovery"]["max_restarts_on_errors"] > 0
    [mount] = task["file_mounts"].values()
    assert mount["mode"] == "MOUNT"
    (fake / "mofi_venv/bin").mkdir(parents=True)
    executable(fake / "mofi_venv/bin/python", '#!/usr/bin/env bash\nprintf "%s " "$@"\nexit 75\n')
    env = {
        **environment(fake),
        **dict.fromkeys(task["envs"], "--config c"),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    # -u: no variable that SkyPilot would not set.
    run = subprocess.run(
        ["bash", "-euc", task["run"]], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 75, run.stderr  # not hidden behind another command
    own = {"tpu": "--config.distributed=True", "gpu": "--coordinator 10.0.0.1:8476 --processes 2"}
    assert run.stdout.startswith("-m mofi_jax.train --config c --workdir /data/run ")
    assert own[kind] in run.stdout
    (mounted,) = task["file_mounts"]
    assert mounted in run.stdout


def test_dockerfile_installs_what_jax_offers_and_runs_as_nobody_special():
    text = (LAUNCH / "Dockerfile").read_text()
    extras = importlib.metadata.metadata("jax").get_all("Provides-Extra")
    [named] = re.findall(r"^\s+(tpu \|.*)\) jax=", text, re.MULTILINE)
    assert set(named.split(" | ")) <= set(extras)
    steps = [line.split() for line in re.sub(r"\\\n", " ", text).splitlines() if line[:1].isupper()]
    order = [step[0] for step in steps]
    assert order.index("USER") < order.index("ENTRYPOINT")
    copies = [i for i, step in enumerate(steps) if step[0] == "COPY"]
    [install] = [
        i for i, step in enumerate(steps) if "requirements.txt" in step and i not in copies
    ]
    assert steps[copies[0]][1] == "requirements.txt"
    assert copies[0] < install < copies[1]  # a changed line of code installs nothing again
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert not {"mofi_jax", "configs", "requirements.txt"} & set(ignored)


def test_shellcheck():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    # Beside the interpreter where requirements-test.txt has put it.
    tool = str(beside) if beside.exists() else "shellcheck"
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]
    assert len(scripts) == 4
    done = subprocess.run([tool, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout

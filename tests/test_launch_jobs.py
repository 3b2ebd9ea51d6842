"""xpk.sh, slurm_gpu.sbatch, SkyPilot tasks and the Dockerfile, against stand-ins for the clouds."""

import importlib.metadata
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

from tests import launching
from tests.launching import LAUNCH, REPOSITORY, TRAIN, calls, faults, plan


@pytest.fixture
def fake(tmp_path):
    """Folder of the stand-ins; its bin/ is all that the scripts find."""
    yield from launching.stand_ins(tmp_path)


# ------------------------------------------------------------------------- xpk

WORKLOAD = "workload w (cluster c, project p, zone z)"


def xpk(fake, *more, code=0):
    plan(fake, str(code))  # of the workload
    options = "--workload w --cluster c --zone z --tpu-type v6e-256 --slices 2 --image i --spot"
    return launching.run(fake, [LAUNCH / "xpk.sh", *options.split(), *more, "--", *TRAIN])


def made(fake, verb):
    return calls(fake, "workload", verb)


@pytest.mark.parametrize("code", [0, 125])
def test_xpk_submits_waits_and_tells_the_end(fake, code):
    done = xpk(fake, "--create-arg", "--priority=high", code=code)
    assert done.returncode == code, done.stderr
    assert "may still be running" not in done.stderr
    [create] = made(fake, "create")
    assert create[-1] == "--priority=high"
    flags = dict(zip(create[3:-2:2], create[4:-2:2], strict=True))
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
    assert made(fake, "list")[-1][-2:] == ["--wait-for-job-completion", "w"]


@pytest.mark.parametrize(
    ("verb", "line", "code"),
    [("create", "late INT", 130), ("wait", "INT", 130), ("wait", "TERM", -signal.SIGTERM)],
)
def test_xpk_interrupted_names_the_workload_and_called_again_waits_for_it(fake, verb, line, code):
    faults(fake, verb, line)
    done = xpk(fake)
    assert done.returncode == code
    again = xpk(fake, code=125)
    assert again.returncode == 125, again.stderr
    assert len(made(fake, "create")) == 1
    launching.assert_named(fake, done.stderr, WORKLOAD, "workload")


def test_xpk_that_cannot_wait_or_list_names_the_workload(fake):
    faults(fake, "wait", "connection timed out")
    done = xpk(fake)
    assert done.returncode == 1
    faults(fake, "list", "connection timed out")
    again = xpk(fake)
    assert again.returncode == 1
    assert "error: xpk cannot list the workloads of c: see its errors above.\n" in again.stderr
    assert again.stderr.splitlines()[-3:] == done.stderr.splitlines()[-3:]
    launching.assert_named(fake, done.stderr, WORKLOAD, "workload")


def test_xpk_keeps_the_exit_code_of_a_refused_request_and_names_what_it_has_left(fake):
    faults(fake, "create", "quota", "late quota")
    refused = xpk(fake)
    assert refused.returncode == 1
    assert refused.stderr == "ERROR: quota\n"
    late = xpk(fake)
    assert late.returncode == 1
    launching.assert_named(fake, late.stderr, WORKLOAD, "workload")


def test_xpk_replaces_a_finished_workload_of_the_name(fake):
    assert xpk(fake, code=125).returncode == 125
    assert xpk(fake).returncode == 0
    assert len(made(fake, "delete")) == 1
    assert len(made(fake, "create")) == 2


def test_xpk_dry_run_prints_commands_that_a_shell_reads_back(fake):
    dry = xpk(fake, "--dry-run", "--project", "p")
    assert dry.returncode == 0
    assert dry.stderr == ""
    assert calls(fake) == []
    xpk(fake)
    real = [made(fake, "create")[0], made(fake, "list")[-1]]
    (fake / "calls").unlink()
    launching.run(fake, ["bash", "-c", dry.stdout])
    assert calls(fake) == real


def test_xpk_refuses_a_name_that_kubernetes_would_refuse(fake):
    done = xpk(fake, "--workload", "my.w")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --workload=my.w: write a name of small letters")
    assert calls(fake) == []


@pytest.mark.parametrize("tool", ["gcloud", "xpk"])
def test_xpk_names_the_tool_that_is_not_installed(fake, tool):
    (fake / "bin" / tool).unlink()
    done = xpk(fake)
    assert done.returncode == 2
    assert done.stderr == f"error: {tool} is not installed or not on the PATH.\n"


# ------------------------------------------------------------------------- SLURM


def slurm(fake, *steps, start=launching.run, **extra):
    plan(fake, *steps)
    env = {
        "SLURM_SUBMIT_DIR": str(fake),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "96",
        "PYTHON": "python3",
    }
    return start(fake, ["bash", LAUNCH / "slurm_gpu.sbatch", *TRAIN], env=env | extra)


def slurm_calls(fake):
    return [" ".join(call) for call in calls(fake)]


def test_slurm_starts_one_process_a_node_with_all_gpus(fake):
    assert slurm(fake, "exit 0").returncode == 0
    [command] = slurm_calls(fake)
    assert command.endswith(" ".join(["-m", "mofi_jax.train", *TRAIN, "--config.distributed=True"]))
    assert "--kill-on-bad-exit=0" in command
    assert "--cpus-per-task=96" in command
    assert (fake / "devices").read_text() == "0,1,2,3,4,5,6,7\n"


def test_slurm_alone_on_a_node_needs_no_cluster(fake):
    assert slurm(fake, "exit 0", SLURM_JOB_NUM_NODES="1").returncode == 0
    [command] = slurm_calls(fake)
    assert "distributed" not in command
    assert (fake / "devices").read_text() == "unset\n"


def test_slurm_end_of_time_saves_and_requeues(fake):
    job = slurm(fake, "saving", start=launching.start)
    deadline = time.monotonic() + 20
    while not (fake / "running").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=20)
    assert job.returncode == 75
    assert slurm_calls(fake)[1:] == ["srun saved", "scontrol requeue 77"]


def test_slurm_preemption_requeues_crash_tries_again_bad_input_ends(fake):
    assert slurm(fake, "exit 1", "exit 137", "exit 75").returncode == 75
    assert slurm_calls(fake)[-1] == "scontrol requeue 77"
    (fake / "calls").unlink()
    assert slurm(fake, *["exit 139"] * 5).returncode == 139
    assert sum("mofi_jax.train" in line for line in slurm_calls(fake)) == 4
    (fake / "calls").unlink()
    assert slurm(fake, "exit 2", "exit 0").returncode == 2
    assert not any("scontrol" in line for line in slurm_calls(fake))


def test_slurm_job_that_cannot_be_requeued_keeps_its_exit_code_and_says_what_to_do(fake):
    faults(fake, "scontrol", "requeue is disabled")
    done = slurm(fake, "exit 75")
    assert done.returncode == 75
    assert "job 77 was not requeued: submit the same command again to resume\n" in done.stdout


def test_slurm_array_is_a_sweep(fake):
    slurm(fake, "exit 0", SLURM_ARRAY_TASK_ID="5", SLURM_JOB_NUM_NODES="1")
    [command] = slurm_calls(fake)
    assert command.endswith(" ".join(["-m", "mofi_jax.sweep", *TRAIN, "--index=5"]))


@pytest.mark.parametrize(
    ("options", "job"),
    [
        ([], {"SLURM_JOB_NUM_NODES": "1"}),
        (["--nodes=2"], {}),
        (["-N", "2", "--gres", "gpu:h100:4"], {"SLURM_GPUS_ON_NODE": "4"}),
        (["--array=0-11"], {"SLURM_JOB_NUM_NODES": "1", "SLURM_ARRAY_TASK_ID": "TASK"}),
    ],
)
def test_slurm_dry_run_prints_what_is_submitted_and_what_the_job_runs(fake, options, job):
    script = LAUNCH / "slurm_gpu.sbatch"
    dry = launching.run(fake, ["bash", script, "--dry-run", *options, "--", *TRAIN])
    assert (dry.returncode, dry.stderr) == (0, "")
    assert calls(fake) == []
    env = {"SLURM_CPUS_ON_NODE": "CPUS", "PYTHON": ".venv/bin/python"}
    slurm(fake, "exit 0", **env, **job)
    real, devices = calls(fake), (fake / "devices").read_text()
    (fake / "calls").unlink()
    plan(fake, "exit 0")
    launching.run(fake, ["bash", "-c", dry.stdout])
    assert calls(fake) == [["sbatch", *options, str(script), *TRAIN], *real]
    assert (fake / "devices").read_text() == devices


def test_slurm_dry_run_without_dashes_is_refused(fake):
    done = launching.run(fake, ["bash", LAUNCH / "slurm_gpu.sbatch", "--dry-run", *TRAIN])
    assert done.returncode == 2
    assert done.stderr == "error: write -- before the flags of the training.\n"
    assert done.stdout == ""


def test_slurm_is_signalled_early_and_keeps_its_log():
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


def sky(fake, kind, flags):
    """The task on the second of two nodes, as SkyPilot runs it: in bash, with these variables."""
    task = yaml.safe_load((LAUNCH / f"skypilot_{kind}.yaml").read_text())
    (fake / "mofi_venv/bin").mkdir(parents=True)
    launching.executable(fake / "mofi_venv/bin/python", "printf '%s\\n' \"$@\"\nexit 75\n")
    env = {
        **dict.fromkeys(task["envs"], flags),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    # -u: no variable that SkyPilot would not set.
    return task, launching.run(fake, ["bash", "-uc", task["run"]], env=env)


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_skypilot_recovers_from_preemption_and_runs_on_all_nodes(fake, kind):
    task, run = sky(fake, kind, "--config c")
    resources = task["resources"]
    assert resources["use_spot"] is True
    assert resources["job_recovery"]["recover_on_exit_codes"] == [os.EX_TEMPFAIL]
    assert resources["job_recovery"]["max_restarts_on_errors"] > 0
    [(mounted, mount)] = task["file_mounts"].items()
    assert mount["mode"] == "MOUNT"
    assert run.returncode == 75, run.stderr  # not hidden behind another command
    own = {
        "tpu": ["--config.distributed=True"],
        "gpu": ["--coordinator", "10.0.0.1:8476", "--processes", "2", "--process", "1"],
    }
    words = ["-m", "mofi_jax.train", "--config", "c", "--workdir", f"{mounted}/run", *own[kind]]
    assert run.stdout.splitlines() == words


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_skypilot_flags_arrive_whole_and_expand_nothing(fake, kind):
    flags = """--config.total="20 epochs" --config.data.dir='/data/[a]* $HOME'
        --config.x=a\\ b --config.y=$(id) --config.z=*"""
    _, run = sky(fake, kind, flags)
    words = [
        *("--config.total=20 epochs", "--config.data.dir=/data/[a]* $HOME"),
        *("--config.x=a b", "--config.y=$(id)", "--config.z=*"),
    ]
    assert run.stdout.splitlines()[2:7] == words


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_skypilot_flags_with_an_open_quote_start_nothing(fake, kind):
    _, run = sky(fake, kind, "--config c --config.total='20 epochs")
    assert run.returncode == 2
    assert run.stdout == ""
    assert "unmatched single quote" in run.stderr


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
    # Beside the interpreter, where requirements-test.txt has put it.
    tool = pathlib.Path(sys.executable).with_name("shellcheck")
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]
    assert len(scripts) == 5
    done = subprocess.run([tool, "-x", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


def test_no_script_runs_what_it_downloads():
    for path in LAUNCH.iterdir():
        assert not re.search(r"\b(curl|wget)\b.*\|\s*(sudo\s+)?(ba)?sh\b", path.read_text()), path

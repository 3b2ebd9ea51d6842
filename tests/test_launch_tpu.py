"""tpu_queued_resource.sh and tpu_host.sh against stand-ins for gcloud and the hosts."""

import os
import signal
import subprocess

import pytest

from tests import launching
from tests.launching import LAUNCH, TRAIN, calls, faults, plan, queued

OPTIONS = ("--name", "pod", "--zone", "z", "--accelerator-type", "v5litepod-16")
LOST = "connection timed out"
DELETE = "gcloud compute tpus queued-resources delete pod --force --zone z --quiet --project p "


@pytest.fixture
def fake(tmp_path):
    """Folder of the stand-ins; its bin/ is all that the scripts find."""
    yield from launching.stand_ins(tmp_path)


def command(fake, *options, train=TRAIN):
    script = fake.parent / "repository/launch/tpu_queued_resource.sh"
    return [script, *OPTIONS, *options, "--", *train]


def launch(fake, *options, steps=(), train=TRAIN, **popen):
    plan(fake, *steps)
    return launching.run(fake, command(fake, *options, train=train), **popen)


def assert_named(fake, errors):
    assert errors.splitlines()[-1] == DELETE
    launching.assert_named(fake, errors, "pod (project p, zone z)", "state")


def already_there(fake, state="ACTIVE", description=""):
    (fake / "state").write_text(state)
    (fake / "description").write_text(description)


# ------------------------------------------------------------------------- the run


def test_queued_resource_is_requested_trained_on_and_deleted(fake):
    done = launch(fake, "--spot", steps=["exit 0"])
    assert done.returncode == 0, done.stderr
    [create] = queued(fake, "create")
    wanted = "--node-id pod --accelerator-type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite"
    assert wanted in " ".join(create)
    assert "--spot" in create
    for host in ("pod.0", "pod.1"):
        home = fake / "hosts" / host
        # Every host got the flags unharmed, and runs from the repository's root.
        arguments = (home / "arguments").read_text().splitlines()
        assert arguments == ["-m", "mofi_jax.train", *TRAIN, "--config.distributed=True"]
        assert "jax[tpu]" in (home / "uv_calls").read_text()
    assert done.stdout == "in mofi_jax\nstarted: exit 0\n"  # the log, no byte more or less
    assert len(queued(fake, "delete")) == 1
    assert not (fake / "state").exists()
    assert "may still be running" not in done.stderr


def test_preemption_with_and_without_a_checkpoint_runs_the_same_command_again(fake):
    done = launch(fake, steps=["exit 75", "preempted", "exit 75", "exit 0"])
    assert done.returncode == 0, done.stderr
    assert "finished after 3 preemptions and 0 crashes" in done.stderr
    # Only the lost slice was requested anew; what is installed on the other is used again.
    assert len(queued(fake, "create")) == 2
    assert len(calls(fake, "compute", "tpus", "tpu-vm", "scp")) == 2
    assert (fake / "plan").read_text() == ""


def test_crashes_are_bounded_show_all_hosts_and_end_with_the_last_exit_code(fake):
    done = launch(fake, "--max-crashes", "1", steps=["killed", "exit 134"])
    assert done.returncode == 134
    assert "crashed with exit code 137 (1 of at most 1)" in done.stderr
    assert "crashed with exit code 134 (2 of at most 1)" in done.stderr
    assert (fake / "plan").read_text() == ""
    assert done.stderr.count("---") >= 4  # two hosts, two times
    assert not (fake / "state").exists()


def test_bad_input_is_not_tried_again(fake):
    done = launch(fake, steps=["exit 2", "exit 0"])
    assert done.returncode == 2
    assert (fake / "plan").read_text() == "exit 0\n"
    assert not (fake / "state").exists()


def test_slices_of_others_are_used_and_kept(fake):
    already_there(fake)
    done = launch(fake, steps=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert not queued(fake, "create")
    assert not queued(fake, "delete")
    assert_named(fake, done.stderr)


def test_keep_leaves_the_slices_and_names_them(fake):
    done = launch(fake, "--keep", steps=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert not queued(fake, "delete")
    assert_named(fake, done.stderr)


def test_several_slices(fake):
    done = launch(fake, "--slices", "2", steps=["exit 0", "exit 0"])
    assert done.returncode == 0, done.stderr
    [create] = queued(fake, "create")
    assert "--node-count 2 --node-prefix pod" in " ".join(create)
    hosts = sorted(path.parent.name for path in (fake / "hosts").glob("*/arguments"))
    assert hosts == ["pod-0.0", "pod-0.1", "pod-1.0", "pod-1.1"]


def test_dry_run_prints_commands_that_a_shell_reads_back(fake):
    done = launch(fake, "--dry-run", "--bucket", "gs://my-bucket")
    assert done.returncode == 0, done.stderr
    assert calls(fake) == []
    assert "may still be running" not in done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("gcloud compute tpus ") for line in lines)
    assert any("mount\\ my-bucket" in line for line in lines)
    # What is printed does what it says: run by a shell, it is the very call.
    start = next(line for line in lines if "start\\ " in line)
    launching.run(fake, ["bash", "-c", start])
    [call] = calls(fake)
    words = subprocess.run(
        ["bash", "-c", f'printf "%s\\n" {call[call.index("--command") + 1]}'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert words[2:] == ["start", *TRAIN, "--config.distributed=True"]


@pytest.mark.parametrize(
    ("options", "train", "sentence"),
    [
        (("--zone",), TRAIN, "Unknown option"),
        (("--speed", "9"), TRAIN, "Unknown option --speed"),
        (("--slices", "0"), TRAIN, "--slices=0"),
        (("--slices", "08"), TRAIN, "--slices=08"),
        (("--poll", "0"), TRAIN, "--poll=0: write a whole number from 1."),
        (("--poll", "-5"), TRAIN, "--poll=-5: write a whole number from 1."),
        (("--poll", "often"), TRAIN, "--poll=often: write a whole number from 1."),
        (("--poll", ""), TRAIN, "--poll=: write a whole number from 1."),
        (("--max-crashes", "few"), TRAIN, "--max-crashes=few"),
        (("--spot", "--reserved"), TRAIN, "exclude each other"),
        (("--name", ""), TRAIN, "--name is missing"),
        (("--name", "my pod"), TRAIN, "--name=my pod: write a name of small letters"),
        (("--name", "-pod"), TRAIN, "--name=-pod: write a name of small letters"),
        (("--accelerator-type", "v9-8"), TRAIN, "No runtime version is known for v9-8"),
        ((), ("--workdir", "w"), "No --config"),
        ((), ("--config", "c"), "No --workdir"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence_before_anything_is_requested(
    fake, options, train, sentence
):
    done = launch(fake, *options, train=train, steps=["exit 0"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr or options == ("--zone",)
    assert len(done.stderr.splitlines()) == 1
    assert calls(fake) == []


@pytest.mark.parametrize("lacking", ["gcloud", "project"])
def test_without_gcloud_or_a_project_nothing_is_requested(fake, lacking):
    if lacking == "gcloud":
        (fake / "bin/gcloud").unlink()
    else:
        (fake / "project").write_text("")
    done = launch(fake)
    assert done.returncode == 2
    [sentence] = done.stderr.splitlines()
    assert lacking in sentence
    assert calls(fake) == []


def test_script_finds_its_parts_from_any_folder_and_by_a_link(fake, tmp_path):
    link = tmp_path / "bin with space" / "train_on_tpu"
    link.parent.mkdir()
    link.symlink_to(command(fake)[0])
    plan(fake, "exit 0")
    done = launching.run(fake, [link, *command(fake)[1:]], cwd="/")
    assert done.returncode == 0, done.stderr


def test_what_gcloud_prints_besides_is_not_taken_for_its_answer(fake):
    gcloud = fake / "bin/gcloud"
    gcloud.write_text(gcloud.read_text().replace("record()", "echo WARNING: old\nrecord()", 1))
    done = launch(fake, steps=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert "in mofi_jax\nstarted: exit 0\n" in done.stdout
    assert queued(fake, "delete")[0][-2:] == ["--project", "p"]
    assert not (fake / "state").exists()


# ------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize(
    ("verb", "lines", "name", "code"),
    [
        ("create", ["late INT"], "INT", 130),
        ("sleep", ["INT"], "INT", 130),
        ("sleep", ["TERM"], "TERM", -signal.SIGTERM),
        ("sleep", ["HUP"], "HUP", -signal.SIGHUP),
        ("scp", ["TERM"], "TERM", -signal.SIGTERM),
        ("delete", ["INT"], "INT", 130),
    ],
)
def test_interrupted_it_names_the_slices_and_called_again_it_goes_on_owning_them(
    fake, verb, lines, name, code
):
    """At the request, while it waits, while it installs and at the deletion."""
    faults(fake, verb, *lines)
    done = launch(fake, steps=["exit 0"])
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == DELETE
    again = launch(fake, steps=["exit 0"])
    assert again.returncode == 0, again.stderr
    assert len(queued(fake, "create")) == 1
    assert not (fake / "state").exists()


def test_a_second_call_follows_the_training_that_runs(fake):
    plan(fake, "slow")
    faults(fake, "sleep", "ok", "TERM")  # while it follows, after the wait for the slices
    first = launching.run(fake, command(fake))
    assert first.returncode == -signal.SIGTERM
    assert "started: slow" in first.stdout
    second = launching.start(fake, command(fake))
    lines = iter(second.stderr.readline, "")
    assert any("following the training that runs there" in line for line in lines)
    (fake / "go").touch()
    output, _ = second.communicate(timeout=30)
    assert second.returncode == 0
    assert output == "in mofi_jax\nstarted: slow\nslow is done\n"  # from its beginning
    assert len(queued(fake, "create")) == 1
    assert not (fake / "state").exists()


# ------------------------------------------------------------------------- gcloud fails


def test_deletion_is_tried_again(fake):
    faults(fake, "delete", "INTERNAL", "INTERNAL")
    done = launch(fake, steps=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert not (fake / "state").exists()
    assert "may still be running" not in done.stderr


def test_deletion_of_what_is_gone_already_is_no_failure(fake):
    faults(fake, "delete", "late INTERNAL")
    done = launch(fake, steps=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert "may still be running" not in done.stderr


@pytest.mark.parametrize(("training", "code"), [(0, 1), (2, 2)])
def test_failed_deletion_names_the_slices_and_keeps_the_exit_code_of_the_run(fake, training, code):
    faults(fake, "delete", *["PERMISSION_DENIED"] * 3)
    done = launch(fake, steps=[f"exit {training}"])
    assert done.returncode == code
    assert "deleting pod (project p, zone z) failed (3 of 3)" in done.stderr
    assert_named(fake, done.stderr)


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_preempted_or_failed_slices_that_cannot_be_deleted_are_named(fake, state):
    already_there(fake, state)
    faults(fake, "delete", *["PERMISSION_DENIED"] * 3)
    done = launch(fake)
    assert done.returncode == 1
    assert not queued(fake, "create")
    assert_named(fake, done.stderr)


def test_gcloud_that_does_not_tell_the_state_names_what_may_be_there(fake):
    already_there(fake)
    faults(fake, "describe", *[LOST] * 20)
    done = launch(fake)
    assert done.returncode == 1
    assert f"ERROR: {LOST}" in done.stderr
    assert "error: gcloud does not tell the state of pod: see its errors above.\n" in done.stderr
    assert_named(fake, done.stderr)


def test_hosts_that_do_not_answer_are_named(fake):
    # Unpacking, installing, stopping and starting work; looking at the log does not.
    faults(fake, "ssh", *["ok"] * 4, *[LOST] * 20)
    done = launch(fake, steps=["slow"])
    assert done.returncode == 1
    assert f"ERROR: {LOST}\nerror: pod does not answer.\n" in done.stderr
    assert_named(fake, done.stderr)


def test_hosts_that_cannot_be_set_up_are_no_crash_of_the_training(fake):
    faults(fake, "scp", LOST)
    done = launch(fake, "--max-crashes", "0", steps=["exit 0"])
    assert done.returncode == 1
    assert "setting up the hosts failed (1 of at most 0)" in done.stderr
    assert "exit code" not in done.stderr
    assert not (fake / "state").exists()


def test_refused_request_says_so_and_leaves_nothing(fake):
    faults(fake, "create", "quota exceeded")
    done = launch(fake)
    assert done.returncode == 1
    sentence = "error: The request for pod was refused: see gcloud's error above."
    assert done.stderr.splitlines()[-2:] == ["ERROR: quota exceeded", sentence]


def test_request_that_fails_after_it_was_made_is_gone_on_with(fake):
    faults(fake, "create", "late quota exceeded")
    done = launch(fake, steps=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert len(queued(fake, "create")) == 1
    assert not (fake / "state").exists()


def test_failed_request_is_tried_three_times_and_deleted(fake):
    (fake / "granted").write_text("FAILED")
    done = launch(fake)
    assert done.returncode == 1
    assert "error: pod failed 3 times: see its state above.\n" in done.stderr
    assert len(queued(fake, "create")) == 3
    assert not (fake / "state").exists()


# ------------------------------------------------------------------------- hosts


def on_host(fake, *words):
    home = fake / "hosts/pod.0"
    script = home / "mofi_jax/launch/tpu_host.sh"
    return launching.run(fake, ["bash", script, *words], env={"HOME": str(home)})


def test_a_training_that_still_runs_is_ended(fake):
    """Its process group, workers of the data included, and nothing else."""
    launch(fake, steps=["exit 0"])
    plan(fake, "slow")
    home = fake / "hosts/pod.0"
    on_host(fake, "start")
    group = int((home / "mofi_pid").read_text())
    os.killpg(group, 0)
    on_host(fake, "stop")
    assert not (home / "mofi_pid").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def test_installer_comes_from_the_package_registry_or_not_at_all(fake):
    home = fake / "hosts/pod.0"
    home.mkdir(parents=True)
    faults(fake, "pip", "no matching distribution")
    done = launching.run(fake, ["bash", LAUNCH / "tpu_host.sh", "install"], env={"HOME": str(home)})
    assert done.returncode == 1
    assert "no matching distribution" in done.stderr
    assert [call[0] for call in calls(fake)] == ["python3"]  # no curl

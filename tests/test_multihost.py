"""Two real processes with four devices each follow the curve of one process with one device."""

import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from etils import epath

from benchmarks import kill_and_resume
from mofi_jax import telemetry, train
from mofi_jax.data import ops
from mofi_jax.training import checkpoint
from tests import datasets

REPOSITORY = epath.Path(__file__).parent.parent

SCRIPT = """
    import sys
    import jax
    from absl import flags
    flags.FLAGS.mark_as_parsed()
    data, workdir, pictures, steps, process, port = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    from mofi_jax import train
    from tests import datasets
    config = datasets.tiny_config(data, steps=int(steps))
    config.evaluators = {"mine": {"kind": "retrieval", "images": pictures, "every": "4 steps"}}
    train.main(
        config, workdir, coordinator=f"localhost:{port}", processes="2", process=process
    )
"""


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def run_two(data, workdir, pictures, steps):
    port = free_port()
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", textwrap.dedent(SCRIPT), str(data), str(workdir)),
                *(str(pictures), str(steps), str(process), str(port)),
            ],
            cwd=REPOSITORY,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


def test_two_processes_equal_one(tmp_path, monkeypatch, meshes):
    data, pictures = tmp_path / "data", tmp_path / "pictures"
    datasets.write(data)
    pictures.mkdir()
    for entity in range(3):
        for i in range(3):
            picture = ops.encode_jpeg(datasets.drawing(entity, 50 + i), 95)
            (pictures / f"{entity}_{i}.jpg").write_bytes(picture)
    run_two(data, tmp_path / "two", pictures, 4)
    monkeypatch.setattr(train.partition, "make_mesh", lambda **_: meshes["1x1x1"])
    config = datasets.tiny_config(data, steps=4)
    config.evaluators = {"mine": {"kind": "retrieval", "images": str(pictures), "every": "4 steps"}}
    train.main(config, str(tmp_path / "one"))
    two, one = (telemetry.read_metrics(tmp_path / name) for name in ("two", "one"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for a, b in zip(two, one, strict=True):
        # A program may be compiled in another interval.
        assert a.keys() ^ b.keys() <= {"speed/compile_seconds"}
        for key in (k for k in a if not k.startswith(telemetry.TIMED)):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    # The table of the run on eight devices is padded to 8 rows, that of one device is not.
    rows = checkpoint.restore_params(tmp_path / "one")["entity_table"].shape[0]
    a, b = (checkpoint.restore_params(tmp_path / n)["entity_table"][:rows] for n in ("two", "one"))
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_run_moves_from_two_processes_to_one_of_other_devices(tmp_path):
    """2 x 4 devices -> 1 x 8 -> 1 x 2, asked to leave by SIGTERM in between; nothing is lost."""
    kill_and_resume.prepare(tmp_path)
    moved = kill_and_resume.moves(tmp_path, steps=9)
    assert moved["codes"] == [[75, 75], [75], [0]]
    assert moved["steps"] == 9
    assert moved["difference"] <= 1e-5
    assert moved["each_once"]
    assert moved["same_steps"]

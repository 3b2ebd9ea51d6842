"""Trains, goes on and evaluates in one of several processes; `start` runs all of them.

    python -m tests.processes '{"process": 0, ...}'

They are joined by jax.distributed over loopback, with four simulated devices each.
"""

import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
from absl import flags
from etils import epath

from configs import eval as eval_config
from mofi_jax import evaluate, inference, train
from mofi_jax.common.errors import Preempted
from mofi_jax.data import ops
from mofi_jax.distributed import meshes, preemption
from tests import datasets

REPOSITORY = epath.Path(__file__).parent.parent
PROCESSES, DEVICES = 2, 4
MANY = 1003  # pictures, which divide neither over devices nor into batches
FEW, OF_CLASS = 9, 40  # pictures of three classes, and more of them to train probes on


def prepare(folder):
    """Data, and a picture set with its classes."""
    datasets.write(folder / "data")
    (folder / "pictures").mkdir()
    (folder / "training").mkdir()
    for entity, i in itertools.product(range(3), range(FEW // 3 + OF_CLASS)):
        picture = ops.encode_jpeg(datasets.drawing(entity, 50 + i), 95)
        part = "pictures" if i < FEW // 3 else "training"
        (folder / part / f"{entity}_{i}.jpg").write_bytes(picture)
    queries = (
        json.dumps({"image": path.name, "classes": [int(path.name.partition("_")[0])]})
        for path in sorted((folder / "pictures").iterdir())
    )
    (folder / "queries.jsonl").write_text("\n".join(queries))
    lines = [
        json.dumps({"class": i, "label": datasets.name_of(i), "id": f"Q{i:03d}"}) for i in range(3)
    ]
    (folder / "classes.jsonl").write_text("\n".join(lines))
    rng = np.random.default_rng(0)
    (folder / "many").mkdir()
    for i in range(MANY):
        picture = ops.encode_jpeg(rng.integers(0, 256, (9, 8, 3), np.uint8), 95)
        (folder / "many" / f"{i % 300}_{i}.jpg").write_bytes(picture)


def train_and_evaluate(folder, name, mesh, **where):
    """Three steps, then four more, evaluated by both mains; ``where``: see `hosts.start`."""
    files = {"images": str(folder / "pictures"), "classes": str(folder / "classes.jsonl")}
    evaluators = {
        kind: {"kind": kind, **files} for kind in ("retrieval", "zeroshot", "classification")
    }
    config = datasets.tiny_config(folder / "data")
    config.mesh.update(mesh)
    config.evaluators = {kind: {**e, "every": "3 steps"} for kind, e in evaluators.items()}
    config.total = "3 steps"
    # All hosts change their input at the same step.
    config.stages = (
        {"length": "1 step", "image_size": 8},
        {"length": "1 step", "patch_dropout": 0.5},
    )
    train.main(config, str(folder / name), **where)
    config.total = "7 steps"
    train.main(config, str(folder / name))
    config = eval_config.get_config("sample")
    config.mesh.update(mesh)
    config.evaluators = evaluators
    evaluate.main(config, str(folder / name), str(folder / f"{name}.scores"))
    # To the bit: towers whose weights are split may add up in another order.
    many = {"kind": "retrieval", "images": str(folder / "many")}
    probes = {"images": str(folder / "pictures"), "train": str(folder / "training")}
    config.evaluators = {
        **{"many": many, "again": many},
        "knn": {"kind": "knn", **probes},
        "few_shot": {"kind": "few_shot", "shots": (2, 5), **probes},
        "lbfgs": {"kind": "linear_probe", **probes},
        "adamw": {"kind": "linear_probe", "form": "clip_benchmark_adamw", **probes},
        "query_index": {
            "kind": "query_index",
            "protocol": "uned",
            "queries": str(folder / "queries.jsonl"),
            "images": str(folder / "pictures"),
            "index": str(folder / "training"),
        },
    }
    config.raw_pixels_size = 8
    decode, decoded = inference.RawPixels.decode, []

    def noted(towers, data):
        decoded.append(hashlib.sha256(data).hexdigest())
        return decode(towers, data)

    with mock.patch.object(inference.RawPixels, "decode", noted):
        evaluate.main(config, "raw_pixels", str(folder / f"{name}.many"))
    (folder / f"{name}.decoded.{jax.process_index()}").write_text("\n".join(decoded))


def preempt(folder, name, mesh, process):
    """A resumed run gets SIGTERM in one process, before its loop: both save at the same step."""
    config = datasets.tiny_config(folder / "data", steps=1_000_000)
    config.mesh.update(mesh)
    config.checkpoint.every = config.log_every = "100000 steps"
    defer_exit = preemption.PreemptionGuard.defer_exit

    def interrupted(self):
        if process == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        defer_exit(self)

    preemption.PreemptionGuard.defer_exit = interrupted
    try:
        train.main(config, str(folder / name))
    except Preempted as preempted:
        print(preempted)
        sys.exit(preempted.exit_code)


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def of_a_node(process, command):
    """The command on a node of its own, as far as jaxlib sees: it tells them apart by boot id."""
    script = (
        f"echo 00000000-0000-0000-0000-{process:012d} > $0 && "
        'mount --bind $0 /proc/sys/kernel/random/boot_id && rm $0 && exec "$@"'
    )
    # A file of this process's own: another test process may start nodes at the same moment.
    name = f"{tempfile.gettempdir()}/mofi_jax_boot_id_{os.getpid()}_{process}"
    return ["unshare", "--mount", "sh", "-c", script, name, *command]


def nodes_can_be_made():
    """Mount namespaces are for root, where they are permitted at all."""
    try:
        return subprocess.run(of_a_node(0, ["true"]), check=False).returncode == 0
    except OSError:
        return False


def start(folder, name, **options):
    """Runs `main` in `PROCESSES` processes; returns their exit codes and what they printed."""
    port, nodes = free_port(), nodes_can_be_made()
    processes = []
    for i in range(PROCESSES):
        where = {"process": i, "coordinator": f"localhost:{port}", "nodes": nodes}
        settings = {"folder": str(folder), "name": name, **where, **options}
        command = [sys.executable, "-m", "tests.processes", json.dumps(settings)]
        processes.append(
            subprocess.Popen(
                of_a_node(i, command) if nodes else command,
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def main(options):
    folder, name, mesh = epath.Path(options["folder"]), options["name"], options["mesh"]
    process = options["process"]
    flags.FLAGS.mark_as_parsed()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    make_mesh = meshes.make_mesh
    if options.get("permuted"):

        def permuted(*sizes, **axes):
            blocks = np.array(jax.devices()).reshape(PROCESSES, DEVICES)
            devices = blocks.T.ravel().tolist()  # of processes 0, 1, 0, 1, ...
            return make_mesh(*sizes, **axes, devices=devices)

        meshes.make_mesh = permuted
    if options.get("slices"):
        meshes.slice_of = lambda device: device.process_index
    train_and_evaluate(
        folder,
        name,
        mesh,
        coordinator=options["coordinator"],
        processes=str(PROCESSES),
        process=str(process),
    )
    assert not options["nodes"] or len({d.slice_index for d in jax.devices()}) == PROCESSES
    if options.get("preempt"):
        preempt(folder, name, mesh, process)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""Two real processes with four devices each, wherever these lie in the mesh, equal one process."""

import itertools
import json

import pytest

from benchmarks import kill_and_resume, resume_workers
from mofi_jax import telemetry
from mofi_jax.common.errors import Preempted
from tests import processes

LAYOUTS = {
    # Nodes that jaxlib takes for slices, and a mesh in which their devices alternate.
    "scattered": {"mesh": {}, "permuted": True},
    "slices": {"mesh": {"replica": 2}, "slices": True, "preempt": True},
}


@pytest.mark.parametrize("layout", ["scattered", pytest.param("slices", marks=pytest.mark.slow)])
def test_two_processes_equal_one(tmp_path, layout):
    """Losses and scores of a training with evaluators, of its resume and of `evaluate`."""
    options = LAYOUTS[layout]
    processes.prepare(tmp_path)
    codes, outputs = processes.start(tmp_path, "two", **options)
    processes.train_and_evaluate(tmp_path, "one", options["mesh"])
    assert codes == [Preempted.exit_code if options.get("preempt") else 0] * 2, outputs
    two, one = (telemetry.read_metrics(tmp_path / name) for name in ("two", "one"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for a, b in zip(two, one, strict=True):
        assert a.keys() == b.keys()
        for key in (k for k in a if not k.startswith(telemetry.TIMED)):
            assert a[key] == pytest.approx(b[key], rel=1e-6), key
    for part, names in {
        "scores": {"retrieval", "zeroshot", "classification"},
        "many": {"many", "again", "knn", "few_shot", "lbfgs", "adamw", "query_index"},
    }.items():
        two, one = (
            json.loads((tmp_path / f"{name}.{part}/result.json").read_text())["models"][0]
            for name in ("two", "one")
        )
        assert two["metrics"].keys() == one["metrics"].keys()
        for name, values in two["metrics"].items():
            # Probes add up rows in another order.
            within = 1e-6 if name in ("few_shot", "lbfgs", "adamw") else 0
            assert values == pytest.approx(one["metrics"][name], abs=within), name
        assert two["protocols"] == one["protocols"]
        assert set(one["metrics"]) == names
    # Each picture once over the whole job, and half of them by each process.
    shares = [(tmp_path / f"two.decoded.{i}").read_text().split() for i in range(2)]
    everything = (tmp_path / "one.decoded.0").read_text().split()
    total = processes.MANY + processes.FEW + 3 * processes.OF_CLASS
    assert len(everything) == total
    assert sorted(itertools.chain(*shares)) == sorted(everything)
    assert max(map(len, shares)) <= total * 0.52


@pytest.mark.parametrize(
    "devices", [[(2, 4), (1, 2)], pytest.param([(2, 4), (1, 8), (1, 2)], marks=pytest.mark.slow)]
)
def test_a_run_moves_from_two_processes_to_one_of_other_devices(devices, tmp_path):
    """Processes x devices, preempted by SIGTERM in one process in between; nothing is lost."""
    kill_and_resume.prepare(tmp_path)
    clusters, steps = [kill_and_resume.Cluster(*sizes) for sizes in devices], 3 * len(devices)
    moved = kill_and_resume.moves(tmp_path, clusters, steps=steps)
    *left, finished = devices
    assert moved["codes"] == [*([75] * processes for processes, _ in left), [0] * finished[0]]
    assert moved["steps"] == steps
    assert moved["difference"] <= 1e-5
    assert moved["each_once"]
    assert moved["same_steps"]


@pytest.mark.slow
def test_data_workers_and_fewer_hosts_change_no_bit(tmp_path):
    kill_and_resume.prepare(tmp_path)
    found = resume_workers.resumed(tmp_path, range(4))
    assert found == {"differing": 0, "same_rows": True}

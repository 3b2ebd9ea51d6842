"""Plans: B/16 compiled for a TPU slice, what is told when a step does not fit, bad input."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys

import jax
import pytest
from etils import epath

from configs import mofi, quickstart
from mofi_jax.common.errors import BadInput
from mofi_jax.plan import __main__ as plan
from mofi_jax.plan import hlo, tpu_topology
from mofi_jax.telemetry import accelerators
from mofi_jax.training import cadence, setup, state

REPOSITORY = epath.Path(__file__).parent.parent

needs_compiler = pytest.mark.skipif(
    not tpu_topology.COMPILER.exists(), reason="make test installs the TPU compiler"
)

V5E = accelerators.chip_of(type("Device", (), {"device_kind": "TPU v5 lite"}))


def run_plan(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mofi_jax.plan", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def plan_that_fits(tmp_path, chips, *arguments):
    """The result of a plan after what every plan of a step that fits must show."""
    done = run_plan(*arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["chips"], result["fits"], result["chip"]["name"]) == (chips, True, "TPU v5e")
    needed = sum(result["memory"].values())
    assert needed == result["needed"] < result["available"] == 16 * plan.GIB
    assert {c["group"] for c in result["collectives"]} == {chips}
    assert 0.02 < result["mfu_estimate"] < result["mfu_bound"] <= 1
    spent = sum(result["estimate"].values())
    assert result["step_seconds"] == pytest.approx(max(spent, *result["bounds"].values()))
    assert result["not_estimated"] == []
    assert {"matrix products", "attention", "entity softmax", "optimizer"} <= set(
        result["estimate"]
    )
    assert f"mesh replica 1 x fsdp {chips} x tensor 1: " in done.stdout
    assert f" GiB of state on each of {chips} devices, " in done.stdout
    for line in ("class table", "MFU at most", "model FLOPs", "estimated time of a step"):
        assert line in done.stdout
    assert "has no constant trip count" not in done.stderr
    return result


@needs_compiler
def test_a_small_model_on_four_chips(tmp_path):
    arguments = ("--config", "configs/quickstart.py:task=supervised", "--topology", "v5e:2x2")
    result = plan_that_fits(tmp_path, 4, *arguments, "--entities=1000")
    assert result["memory"]["class table"] == 250 * result["config"]["model"]["embed_dim"] * 4


@needs_compiler
@pytest.mark.slow
def test_b16_on_sixteen_chips(tmp_path):
    result = plan_that_fits(
        *(tmp_path, 16),
        *("--config", "configs/mofi.py:task=supervised,variant=B/16", "--topology", "v5e:4x4"),
        *("--config.batch_size=2048", "--entities=2_000_000", "--config.model.remat=full"),
    )
    memory = result["memory"]
    # 86 million parameters and projections in float32, spread over all chips but for small ones.
    assert 86e6 * 4 / 16 <= memory["parameters"] <= 1.2 * 90e6 * 4 / 16
    assert memory["class table"] == 125_000 * 512 * 4
    assert memory["its moments"] == pytest.approx(125_000 * 512 * 6, rel=0.01)
    assert memory["batch"] >= 128 * 224 * 224 * 3
    assert memory["temporaries"] < 8 * plan.GIB < sum(memory.values()) + 7 * plan.GIB


@needs_compiler
def test_what_does_not_fit_is_told_with_remedies(tmp_path):
    done = run_plan(
        *("--config", "configs/mofi.py:task=contrastive,variant=S/16", "--topology", "v5e:2x2"),
        *("--config.batch_size=65536", "--config.model.remat=none", "--out", str(tmp_path)),
    )
    assert done.returncode == 1, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert not result["fits"]
    assert result["needed"] > result["available"] > 15 * plan.GIB
    assert "temporaries" not in result["memory"]
    # How much is missing is the compiler's to say.
    parts = 2 ** math.ceil(math.log2(result["needed"] / result["available"]))
    assert parts > 8
    for words in ("It does not fit", "GiB a chip of 15.8 GiB", f"--config.microbatches={parts} "):
        assert words in done.stdout
    assert "Traceback" not in done.stderr


MESSAGES = [
    (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (122.76G) exceeds available HBM (15.75G).",
        (122.76, 15.75),
    ),
    (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.06G of 15.75G hbm. Exceeded hbm capacity by 4.31G.",
        (20.06, 15.75),
    ),
]


@pytest.mark.parametrize(("message", "gib"), MESSAGES)
def test_the_compilers_error_is_read(message, gib):
    assert plan.OUT_OF_HBM.search(message)
    assert plan.memory_in(message) == tuple(int(n * 2**30) for n in gib)


def test_other_errors_are_not_out_of_memory():
    assert not plan.OUT_OF_HBM.search("INVALID_ARGUMENT: hbm")
    assert not plan.OUT_OF_HBM.search("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.")
    assert plan.memory_in("RESOURCE_EXHAUSTED: hbm is full") is None


def test_of_stages_the_largest_is_planned_and_the_hours_are_those_of_all(mesh_of):
    config = quickstart.get_config("task=supervised")
    config.stages = (
        {"length": "75 percent", "image_size": 16, "patch_dropout": 0.5},
        {"length": "10 percent", "patch_dropout": 0.5},
    )
    sizes = {"vocab_size": 300, "eos_id": 299, "num_entities": 9, "examples_per_epoch": 100}
    made = setup.make(config, mesh_of["1x1x1"], **sizes)
    stage, cost, shortened = plan.largest_stage(made, 128)
    assert (stage.image_size, stage.patch_dropout) == (40, 0.0)
    assert cost["image"] > cost["classes"] > 0
    assert 0.15 < shortened < 0.5
    whole, part = planned(config, stage=stage), planned(config, stage=stage, shortened=shortened)
    hours = [plan.run_hours(config, p)[1] for p in (whole, part)]
    assert hours[1] == pytest.approx(shortened * hours[0])
    assert "the largest stage, steps 723 to 850: 40 pixels" in plan.describe(config, part)


def planned(config, *, fits=True, needed=4.0, temporaries=3.0, table=0.5, **changes):
    """A plan for 16 chips with numbers of GiB."""
    memory = {"parameters": 0.2, "optimizer": 0.3, "class table": table, "its moments": 0.0}
    memory = {kind: int(gib * plan.GIB) for kind, gib in memory.items()}
    memory |= {"batch": 0} | ({"temporaries": int(temporaries * plan.GIB)} if fits else {})
    fields = {
        "stage": cadence.Stage(0, 10, 224),
        "shortened": 1.0,
        "slices": 1,
        "devices": 16,
        "chips": 16,
        "chip": V5E,
        "batch_size": config.batch_size,
        "mesh": {"replica": 1, "fsdp": 16, "tensor": 1},
        "layout": "1.000 of 16.000 GiB of state on each of 16 devices",
        "memory": memory,
        "needed": int(needed * plan.GIB),
        "available": 16 * plan.GIB,
        "model": {"image": 1e12},
    }
    return plan.Plan(**(fields | changes))


def test_remedies_are_keys_that_the_config_has_and_does_not_use_yet():
    config = mofi.get_config()
    config.batch_size, config.model.remat = 4096, "full"
    hints = "\n".join(plan.remedies(config, planned(config, fits=False, table=1.0)))
    assert "--config.microbatches=2" in hints
    assert "second_moment=row" in hints
    assert "sample_rate=0.1" in hints
    assert "--config.batch_size=2048" in hints
    for used in ("remat", "replica", "first_moment_dtype", "block_size"):
        assert used not in hints
    for key in [word.split("=")[0] for word in hints.split() if word.startswith("--config.")]:
        value = config
        for part in key.removeprefix("--config.").split("."):
            value = value[part]  # raises for a key that there is not

    config.model.remat, config.microbatches, config.losses.entity.block_size = "none", 256, 64
    config.optimizer.first_moment_dtype = "float32"
    replicas = {"replica": 2, "fsdp": 8, "tensor": 1}
    hints = plan.remedies(config, planned(config, fits=False, table=0.0, mesh=replicas))
    hints = "\n".join(hints)
    for needed in (
        "remat=full",
        "mesh.replica=-1 --config.mesh.fsdp=-1",
        "first_moment_dtype",
        "block_size=0",
    ):
        assert needed in hints
    assert "microbatches" not in hints, "a batch of 4,096 has no smaller parts on 16 devices"
    assert "second_moment" not in hints

    config.batch_size, config.microbatches, config.mesh.tensor = 16, 1, -1
    tensor = {"replica": 1, "fsdp": 8, "tensor": 2}
    assert "--config.batch_size=8 halves" in str(
        plan.remedies(config, planned(config, mesh=tensor))
    )


@pytest.mark.parametrize("limit", [100, 700, 1500, 2048, 9000])
def test_the_largest_batch_is_one_that_compiled(limit, monkeypatch, mesh_of):
    config = quickstart.get_config()
    config.batch_size = 1024

    def compile_for(config, mesh, **_):
        fits = config.batch_size <= limit
        grows = 15.0 * config.batch_size / limit  # GiB
        return planned(config, fits=fits, needed=grows + 0.5, temporaries=grows)

    monkeypatch.setattr(plan, "plan", compile_for)
    first = compile_for(config, mesh_of["1x8x1"])
    largest = plan.largest_batch(config, mesh_of["1x8x1"], first, {})
    # Three times half of 1,024 are 128.
    assert largest == 0 if limit < 128 else 0.7 * limit <= largest <= limit
    assert largest % 16 == 0


def test_bounds_and_mfu():
    known = {
        "chips": 2,
        "model": {"image": 2 * 197e12},
        "collectives": (hlo.Collective("all-gather", 16, 1, 100e9, 0.0),),
        "estimate": {"matrix products": 3.0, "attention": 1.0},
        "not_estimated": ("jit(f)/some_kernel",),
    }
    on_v5e = planned(quickstart.get_config(), **known)
    assert on_v5e.bounds == {"model FLOPs": 1.0, "links": 0.5}
    assert on_v5e.mfu_bound == 1
    assert on_v5e.mfu_estimate == 0.25
    slow = hlo.Collective("all-gather", 16, 1, 400e9, 0.0)
    assert dataclasses.replace(on_v5e, collectives=(slow,)).mfu_bound == 0.5
    slower = dataclasses.replace(slow, sent_bytes=1600e9)
    assert dataclasses.replace(on_v5e, collectives=(slower,)).step_seconds == 8, "no less than it"
    v7x = accelerators.chip_of(type("Device", (), {"device_kind": "TPU7x"}))
    bounds = dataclasses.replace(on_v5e, chip=v7x).bounds
    assert bounds["model FLOPs"] == 197 / 2307
    assert bounds["links"] == 100 / 300  # of half a chip
    # v4's maker states no total for its links.
    v4 = accelerators.chip_of(type("Device", (), {"device_kind": "TPU v4"}))
    assert "links" not in dataclasses.replace(on_v5e, chip=v4).bounds
    assert {"fits", "bounds", "mfu_bound", "mfu_estimate"} <= on_v5e.to_dict().keys()
    config = quickstart.get_config()
    config.total = "900 steps"
    page = plan.describe(config, on_v5e)
    assert "  attention                     1000.0   25 %\n" in page
    assert "not estimated: jit(f)/some_kernel" in page
    rate = config.batch_size / 2 / 4
    assert f"estimate: MFU 25 %, {rate:,.0f} img/s a chip, 1.0 hours for 900 steps" in page
    config.total = "20 epochs"  # of how many examples is the data set's to say
    assert plan.run_hours(config, on_v5e)[0] == "1e9 examples"
    assert plan.run_hours(config, on_v5e)[1] == round(1e9 / config.batch_size) * 4 / 3600


def test_a_price_is_a_number_with_or_without_a_currency():
    assert plan.read_price("") == (0.0, "")
    assert plan.read_price("4.20") == (4.2, "")
    assert plan.read_price("4.20 USD") == (4.2, " USD")
    assert plan.read_price("3€") == (3.0, " €")
    for wrong in ("USD", "-1", "0", "1e3 USD", "4 20"):
        with pytest.raises(BadInput, match="is no price"):
            plan.read_price(wrong)


def test_what_is_larger_than_the_chip_does_not_fit_though_it_compiled():
    config = quickstart.get_config()
    assert planned(config, needed=16).fits
    assert not planned(config, needed=16.1).fits
    assert not planned(config, fits=False, needed=1).fits
    assert not planned(config, fits=False, needed=1).to_dict()["fits"]


def test_a_chip_without_figures_is_named(mesh_of):
    sizes = {"num_entities": 1, "vocab_size": 1}
    with pytest.raises(BadInput, match="no figures of cpu: add them"):
        plan.plan(quickstart.get_config(), mesh_of["1x8x1"], **sizes)


def test_state_bytes_are_those_of_real_arrays(mesh_of):
    mesh = mesh_of["2x2x2"]
    config = quickstart.get_config()
    config.model.update({"image": {"width": 16, "layers": 2, "heads": 2}, "embed_dim": 8})
    sizes = {"vocab_size": 100, "eos_id": 99, "num_entities": 1001, "examples_per_epoch": 1000}
    made = setup.make(config, mesh, **sizes)
    structs, _ = state.abstract(made.init, mesh)
    kinds = plan.state_bytes(structs, {})
    arrays, _ = state.create(made.init, 0, mesh)
    here = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(arrays)]
    assert sum(kinds.values()) == sum(here)
    assert kinds["class table"] == 126 * 8 * 4
    assert kinds["its moments"] == 126 * (8 * 8 + 4)


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v9:4x4", "one of v4, v5e, v5p, v6e, tpu7x"),
        ("v5e-256", "as in v5e:16x16"),
        ("v5e:4x4x4", "2 dimensions"),
        ("v5e:32x32", "at most 256 chips"),
    ],
)
def test_wrong_topology(topology, words):
    with pytest.raises(BadInput, match=words):
        tpu_topology.devices(topology)


def test_without_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tpu_topology, "COMPILER", tmp_path / "none")
    with pytest.raises(BadInput, match=r"pip install .* 'libtpu"):
        tpu_topology.devices("v5e:4x4")


def test_command_line_mistakes():
    config = ("--config", "configs/mofi.py")
    done = run_plan(*config, "--topology=v5e:5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines()[-1].startswith("error: --topology=v5e:5 is no slice")
    assert "-0.5 is not a whole number" in run_plan(*config, "--topology=x", "--slices=-0.5").stderr

"""The losses compiled by the real TPU compiler for slices nobody here has: memory, collectives.

The compiler is the package ``libtpu``, which `make test` puts into a folder of its own, so that the
jax of everyday use does not look for a TPU.
"""

import json
import subprocess
import sys

import pytest
from etils import epath

from mofi_jax.plan import tpu_topology

REPOSITORY = epath.Path(__file__).parent.parent

needs_compiler = pytest.mark.skipif(
    not tpu_topology.COMPILER.exists(), reason="make test installs the TPU compiler"
)


def compile_for_tpu(name):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tpu_programs", name],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    result["shapes"] = {tuple(shape) for shape in result["shapes"]}
    result["collectives"] = {
        kind: {tuple(shape) for shape in found} for kind, found in result["collectives"].items()
    }
    return result


def no_large_tensor(program):
    """Neither all logits, nor a chip's share of them, nor the whole table."""
    batch, classes = program["batch"], program["classes"]
    per_chip = -(-classes // program["chips"])
    for shape in program["shapes"]:
        assert not {batch, classes} <= set(shape), shape
        assert not {batch, per_chip} <= set(shape), shape
        assert max(shape) < classes, shape


@needs_compiler
@pytest.mark.parametrize(
    ("name", "limit_mib"),
    [
        ("exact_v5e", 160),
        pytest.param("exact_v6e", 280, marks=pytest.mark.slow),
        pytest.param("exact_v5p_768", 450, marks=pytest.mark.slow),
        pytest.param("learned_arcface_v5e", 160, marks=pytest.mark.slow),
    ],
)
def test_exact_softmax(name, limit_mib):
    program = compile_for_tpu(name)
    assert program["temporary_mib"] <= limit_mib
    no_large_tensor(program)
    assert any(s[0] <= program["batch"] and s[1] == 2048 for s in program["shapes"]), (
        "the walk in blocks is not in this text: look again"
    )
    b, d, k = program["batch"], program["dim"], program["labels"]
    found = program["collectives"]
    assert found.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    # The compiler may prefer an all-reduce to the all-gather or reduce-scatter it is asked for.
    allowed = {(), (b,), (b, k), (b, d), (b // program["chips"], d)}
    assert set().union(*found.values()) <= allowed


@needs_compiler
def test_dense_softmax_is_what_the_blocks_avoid():
    program = compile_for_tpu("dense_v5e")
    assert program["temporary_mib"] > 3900
    assert (8192, 125_000) in program["shapes"], "the check for large tensors sees nothing"


@needs_compiler
@pytest.mark.parametrize(
    ("name", "limit_mib"),
    [
        pytest.param(name, 200, marks=pytest.mark.slow)
        for name in ("sampled_v5e", "sampled_row_v5e")
    ],
)
def test_sampled_step_updates_in_place(name, limit_mib):
    program = compile_for_tpu(name)
    assert program["temporary_mib"] <= limit_mib
    # Table and moments are written where they were read.
    assert program["aliased_mib"] >= 0.98 * (program["argument_mib"] - 1)
    no_large_tensor(program)
    b, d = program["batch"], program["dim"]
    found = program["collectives"]
    assert found.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert set().union(*found.values()) <= {(), (b,), (b, 1), (b, d), (b // program["chips"], d)}


@needs_compiler
@pytest.mark.parametrize(
    ("name", "kinds", "limit_mib"),
    [
        pytest.param(
            *("clip_v5e", {"all-gather", "all-reduce", "reduce-scatter"}, 200),
            marks=pytest.mark.slow,
        ),
        # On four chips the compiler moves a remainder of the gradient by a permutation.
        pytest.param(
            *("clip_v5e_small", {"all-gather", "all-reduce", "collective-permute"}, 200),
            marks=pytest.mark.slow,
        ),
        ("siglip_v5e", {"collective-permute", "all-reduce"}, 64),
    ],
)
def test_contrastive(name, kinds, limit_mib):
    program = compile_for_tpu(name)
    b, chips = program["batch"], program["chips"]
    assert program["temporary_mib"] <= limit_mib
    assert program["collectives"].keys() <= kinds
    assert (b, b) not in program["shapes"]
    if name == "siglip_v5e":
        assert all(max(shape) < b for shape in program["shapes"]), "features were gathered"
        assert program["collectives"]["all-reduce"] <= {()}
        assert (b // chips, program["dim"]) in program["collectives"]["collective-permute"]

"""The TPU compiler's clock: what a step's time goes to, cycles of kernels, collectives."""

import base64
import json
import operator
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mofi_jax.model import attention_kernel
from mofi_jax.plan import clock, hlo, kernels, tpu_topology
from mofi_jax.telemetry import accelerators

V5E = accelerators.chip_of(type("Device", (), {"device_kind": "TPU v5 lite"}))

# One fusion or copy of each kind, as the TPU compiler writes them.
TEXT = """HloModule jit_f, is_scheduled=true

%moved (p: f32[8,4], i: s32[]) -> bf16[4,8] {
  %p = f32[8,4]{1,0} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %less = pred[]{:T(512)} compare(%i, %i), direction=LT
  %narrow = bf16[8,4]{1,0} convert(%p), metadata={op_name="jit(f)/SCOPE/convert_element_type"}
  ROOT %turned = bf16[4,8]{1,0} transpose(%narrow), dimensions={1,0}
}

%projected (p: bf16[8,4], w: bf16[4,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %w = bf16[4,4]{1,0} parameter(1)
  %product = bf16[8,4]{1,0} convolution(%p, %w), dim_labels=bf_io->bf, metadata={op_name="PRODUCT"}
  ROOT %root = bf16[8,4]{1,0} add(%product, %p), metadata={op_name="jit(f)/jvp(norm)/add"}
}

%squared (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %root = bf16[8,4]{1,0} multiply(%p, %p), metadata={op_name="REST"}
}

ENTRY %main.1 (x: f32[8,4]) -> bf16[8,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} constant(1)
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%x, %i), kind=kLoop, calls=%moved, CYCLES(10)
  %w = bf16[4,4]{1,0:T(8,128)(2,1)} constant({...})
  %b = bf16[8,4]{1,0:T(8,128)(2,1)} fusion(%a, %w), kind=kOutput, calls=%projected, CYCLES(200)
  %c = bf16[8,4]{1,0:T(8,128)(2,1)} fusion(%b), kind=kLoop, calls=%squared, NAMED, CYCLES(3000)
  ROOT %d = bf16[8,4]{0,1:T(8,128)(2,1)} copy(%c), CYCLES(40000)
}
"""


def by_cause(text=TEXT, *, product="jit(f)/dot_general", rest="jit(f)/mul", scope="jvp()"):
    """Cycles by cause."""
    text = text.replace("NAMED", 'metadata={op_name="REST"}')
    text = text.replace("PRODUCT", product).replace("REST", rest).replace("SCOPE", scope)
    text = text.replace("CYCLES(", 'backend_config={"estimated_cycles":"').replace('")', '"}')
    text = "\n".join(
        f'{line[:-1]}"}}' if "estimated_cycles" in line else line for line in text.splitlines()
    )
    program = hlo.Program(text)
    found, _ = clock.seconds(program, hlo.collectives(program, devices=8), V5E)
    return {cause: round(seconds * V5E.clock) for cause, seconds in found.items() if seconds}


COPY, PRODUCT, REST = {clock.COPIES: 40_010}, {clock.PRODUCTS: 200}, {clock.REST: 3000}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({}, COPY | PRODUCT | REST),
        # The root of a fusion may belong elsewhere: its product says what it is for.
        ({"product": "jit(f)/jvp(mlp)/dot_general"}, COPY | PRODUCT | REST),
        ({"product": "jit(f)/transpose(jvp())/bnd,dhe->bnhe/dot_general"}, COPY | PRODUCT | REST),
        ({"product": "jit(f)/bqhd,bkhd->bhqk/dot_general"}, COPY | {clock.ATTENTION: 200} | REST),
        (
            {"product": "jit(f)/jvp(entity_softmax)/bd,cd->bc/dot_general"},
            COPY | {"entity softmax": 200} | REST,
        ),
        (
            {"rest": "jit(f)/jvp(attention)/softmax/exp"},
            COPY | PRODUCT | {clock.ATTENTION: 3000},
        ),
        ({"rest": "jit(f)/jvp(attention)/mul"}, COPY | PRODUCT | REST),
        # The copy of it has no name of its own.
        ({"rest": "jit(f)/optimizer/mul"}, {clock.COPIES: 10, "optimizer": 43_000} | PRODUCT),
        (
            {"rest": "jit(f)/transpose(jvp(contrastive))/mul"},
            {clock.COPIES: 10, "contrastive loss": 43_000} | PRODUCT,
        ),
        (
            {"scope": "jvp(patch_embedding)"},
            {clock.COPIES: 40_000, "embedding": 10} | PRODUCT | REST,
        ),
        ({"scope": "jvp(attention)"}, COPY | PRODUCT | REST),
    ],
)
def test_causes(names, expected):
    assert by_cause(**names) == expected


def test_a_copy_without_an_estimate_costs_its_bytes():
    text = "ENTRY %main () -> f32[819,1000] {\n  %x = f32[819,1000]{1,0} parameter(0)\n"
    text += (
        '  ROOT %y = f32[819,1000]{0,1} copy(%x), backend_config={"estimated_cycles":"COUNT"}\n}\n'
    )
    program = hlo.Program(text.replace("COUNT", str(2**63 - 1)))
    found, unknown = clock.seconds(program, (), V5E)
    assert found[clock.COPIES] == pytest.approx(2 * 4e-6)
    assert unknown == ("y",)


def test_loops_and_collectives_that_nothing_hides():
    from tests.test_hlo import TPU_TEXT

    program = hlo.Program(TPU_TEXT)
    moved = hlo.collectives(program, devices=8)
    found, _ = clock.seconds(program, moved, V5E)
    assert found == {
        clock.PRODUCTS: pytest.approx(500 / 1.5e9),
        clock.COPIES: pytest.approx(7 / 1.5e9),
        clock.EXPOSED: pytest.approx(96 / 200e9),
    }
    hidden = hlo.Program(TPU_TEXT.replace(" all-reduce(", " all-reduce-start("))
    moved = hlo.collectives(hidden, devices=8)
    assert moved[0].sent_bytes == 96
    assert not clock.seconds(hidden, moved, V5E)[0][clock.EXPOSED]


def doubled(pictures, *, loops=False, semantics="parallel"):
    """A kernel over pictures, and its argument."""

    def kernel(x, y):
        if loops:
            jax.lax.fori_loop(0, x.shape[1], lambda i, _: y.__setitem__((0, i), x[0, i]), None)
        else:
            y[...] = 2 * x[...]

    block = pl.BlockSpec((1, 8, 128), lambda b: (b, 0, 0))
    x = jax.ShapeDtypeStruct((pictures, 8, 128), jnp.float32)
    run = pl.pallas_call(
        kernel,
        grid=(pictures,),
        in_specs=[block],
        out_specs=block,
        out_shape=x,
        compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,)),
        name="attention_forward",
    )
    return run, x


def lowered_kernels(run, *arguments):
    """Kernels of a function for TPUs as `kernels.scheduled` takes them, in their order."""
    text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    calls = []
    for line in (line for line in text.splitlines() if "@tpu_custom_call(" in line):
        config = re.search(r'backend_config = "([^"]*)"', line)[1].replace("\\22", '"')
        operands, results = (
            [
                [kind.replace("i", "s") if kind[0] == "i" else kind, [*map(int, sizes.split("x"))]]
                for sizes, kind in re.findall(r"tensor<((?:\d+x)*\d+)x(\w+)>", types)
            ]
            for types in line.rsplit(" : ", 1)[1].split(" -> ")
        )
        call = {"operands": operands, "results": results, "config": json.loads(config)}
        calls.append(json.dumps(call))
    return calls


def lowered_kernel(*arguments, **options):
    """The backend_config of `doubled`, as compiled programs carry it."""
    run, x = doubled(*arguments, **options)
    return json.dumps(json.loads(lowered_kernels(run, x)[0])["config"])


def test_steps_of_a_kernels_grid():
    def steps(cores, **options):
        config = json.loads(lowered_kernel(6, **options))
        return kernels.grid_steps(config["custom_call_config"]["body"], cores)

    assert steps(1) == 6
    assert steps(2) == 3
    assert steps(2, semantics="arbitrary") == 6
    assert steps(1, loops=True) is None
    assert kernels.grid_steps("", 1) is None
    assert kernels.grid_steps(base64.b64encode(b"no module").decode(), 1) is None


def program_of_two_kernels():
    """The same one twice, its operand in the vector memory, "S(1)"."""
    call = (
        '%NAME = f32[6,8,128]{2,1,0:T(8,128)} custom-call(%x), custom_call_target="tpu_custom_call"'
        ', metadata={op_name="jit(f)/shard_map/attention_forward"}, '
        f"backend_config={lowered_kernel(6)}"
    )
    return hlo.Program(
        "ENTRY %main () -> f32[6,8,128] {\n"
        "  %x = f32[6,8,128]{2,1,0:T(8,128)S(1)} parameter(0)\n"
        f"  {call.replace('NAME', 'first.1')}\n  ROOT {call.replace('NAME', 'again.2')}\n}}\n"
    )


@pytest.mark.parametrize("bundles", [3, 3_000_000, None])
def test_kernels_cost_their_bundles_or_their_bytes(bundles, monkeypatch):
    monkeypatch.setattr(kernels, "scheduled", lambda calls, chip: [bundles] * len(calls))
    found, unknown = clock.seconds(program_of_two_kernels(), (), V5E)
    least = 6 * 8 * 128 * 4 / 819e9  # of the result alone
    took = least if bundles != 3_000_000 else 6 * bundles / 1.5e9
    assert found[clock.ATTENTION] == pytest.approx(2 * took)
    assert set(unknown) == (set() if bundles else {"jit(f)/shard_map/attention_forward"})


def test_without_a_schedule_the_plan_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(kernels.sys, "executable", "false")
    assert kernels.scheduled(["{}"], V5E) == [None]
    assert "no schedule of the kernels" in caplog.text


@pytest.mark.skipif(
    not tpu_topology.COMPILER.exists(), reason="make test installs the TPU compiler"
)
def test_the_compiler_schedules_a_kernel():
    first, again = kernels.cycles(program_of_two_kernels(), V5E).values()
    # Each picture is one tile: read, doubled, written.
    assert first == again
    assert 6 * 3 <= first <= 6 * 500


@pytest.mark.skipif(
    not tpu_topology.COMPILER.exists(), reason="make test installs the TPU compiler"
)
def test_cycles_of_attention():
    """Forward and backward of a layer of B/16, 128 pictures on a v5e: at most 1.8 million."""
    qkv = jax.ShapeDtypeStruct((128, 200, 3 * 768), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((768,), jnp.bfloat16)
    options = {"heads": 12, "length": 197, "causal": False, "mesh": None}

    def attend(qkv, bias, gradient):
        attended, backward = jax.vjp(
            lambda *arrays: attention_kernel.attend(*arrays, **options), qkv, bias
        )
        return attended, backward(gradient)

    gradient = jax.ShapeDtypeStruct((128, 200, 768), jnp.bfloat16)
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        calls = lowered_kernels(attend, qkv, bias, gradient)
    assert len(calls) == 2
    bodies = (json.loads(call)["config"]["custom_call_config"]["body"] for call in calls)
    steps = [kernels.grid_steps(body, V5E.cores) for body in bodies]
    assert steps == [128 * 3] * 2
    cycles = sum(map(operator.mul, steps, kernels.scheduled(calls, V5E)))
    assert 0.5e6 < cycles <= 1.8e6

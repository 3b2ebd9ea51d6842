"""The text of compiled programs: how often loops run, collectives."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from mofi_jax.distributed import meshes
from mofi_jax.plan import hlo
from mofi_jax.plan.hlo import Collective, collectives

# As the TPU compiler writes loops: no note of the trip count, counters behind copies.
TPU_TEXT = """HloModule jit_f, is_scheduled=true

%body.1 (arg: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %arg = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %step = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%gte.0, %step), backend_config={"flag_configs":[]}
  %gte.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=1
  %square = bf16[4,4]{1,0:T(8,128)(2,1)} constant({...})
  %product = bf16[8,4]{1,0:T(8,128)(2,1)} convolution(%gte.1, %square), dim_labels=bf_io->bf, CYCLES
  ROOT %result = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%next, %product)
}

%until.1 (arg.1: (s32[], bf16[8,4])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %gte.2 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%gte.2, %limit), direction=LT
}

ENTRY %main.1 (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(3)
  %start = s32[]{:T(128)} copy(%zero)
  %init = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%start, %x)
  %loop = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)}) while(%init), condition=%until.1, body=%body.1
  %last = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %copied = bf16[8,4]{0,1:T(8,128)(2,1)} copy(%last), backend_config={"estimated_cycles":"7"}
  ROOT %sum = bf16[8,4]{1,0:T(8,128)(2,1)} all-reduce(%copied), GROUPS, to_apply=%add
}
"""
TPU_TEXT = TPU_TEXT.replace(
    "GROUPS", "channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}"
).replace(
    "CYCLES",
    'metadata={op_name="jit(f)/while/dot_general" stack_frame_id=1}, '
    'backend_config={"window_config":{"estimated_cycles":"100"}}',
)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def products(text):
    """How many matrix products a program executes."""
    program = hlo.Program(text)
    return sum(
        times * [i.opcode for i in program.computations[name].values()].count("dot")
        for name, times in program.executions.items()
    )


def test_a_scan_counts_as_often_as_it_runs():
    def scan(x, weights):
        return lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    assert products(compiled(scan, jnp.ones((8, 16)), jnp.ones((20, 16, 16)))) == 20


def test_nested_loops_multiply():
    def nested(x, w):
        inner = lambda _, x: x @ w  # noqa: E731
        return lax.fori_loop(0, 3, lambda _, x: lax.fori_loop(0, 5, inner, x), x)

    assert products(compiled(nested, jnp.ones((8, 8)), jnp.ones((8, 8)))) == 15


def test_a_loop_of_unknown_length_counts_once_and_is_told(caplog):
    def search(x, w):
        return lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ w, x)

    assert products(compiled(search, jnp.ones((8, 8)), jnp.ones((8, 8)))) == 1
    assert "has no constant trip count" in caplog.text


def test_collectives_of_a_mesh(mesh_of):
    mesh = mesh_of["2x2x2"]

    def shard(x):
        rows = lax.all_gather(x, meshes.BATCH_AXES, axis=0, tiled=True)

        def turn(total, _):
            return total + lax.psum(rows * total, "tensor"), None

        total, _ = lax.scan(turn, rows, None, length=5)
        return lax.psum_scatter(total, meshes.ALL_AXES, scatter_dimension=0, tiled=True)

    spec = P(meshes.BATCH_AXES)
    run = jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    found = collectives(hlo.Program(compiled(run, x)), devices=8)
    whole = 64 * 32 * 4
    by_kind = {c.kind: c for c in found}
    assert by_kind["all-gather"] == Collective("all-gather", 4, 1, *[whole * 3 / 4] * 2)
    assert by_kind["all-reduce"] == Collective("all-reduce", 2, 5, *[5.0 * whole] * 2)
    scattered = by_kind["reduce-scatter"]
    assert (scattered.group, scattered.sent_bytes) == (8, whole * 7 / 8)
    assert [c.sent_bytes for c in found] == sorted((c.sent_bytes for c in found), reverse=True)


def test_permutations_are_sent_whole(mesh_of):
    def shard(x):
        return lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)])

    spec = P(meshes.BATCH_AXES)
    run = jax.shard_map(shard, mesh=mesh_of["1x8x1"], in_specs=spec, out_specs=spec)
    text = compiled(run, jax.ShapeDtypeStruct((64, 32), jnp.float32))
    [found] = collectives(hlo.Program(text), devices=8)
    assert (found.kind, found.sent_bytes) == ("collective-permute", 8 * 32 * 4)


def test_the_text_of_the_tpu_compiler():
    program = hlo.Program(TPU_TEXT)
    assert program.executions == {"main.1": 1, "body.1": 5}  # 3, 5, 7, 9, 11
    product = program.computations["body.1"]["product"]
    assert (product.opcode, product.operands) == ("convolution", ("gte.1", "square"))
    assert (product.arrays, product.array_bytes) == ((("bf16", (8, 4)),), (64,))
    assert collectives(program, devices=8) == (Collective("all-reduce", 4, 1, 96.0, 96.0),)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("direction=LT", "direction=NE"),
        ("%zero = s32[]{:T(128)} constant(3)", "%zero = s32[]{:T(128)} parameter(1)"),
        ("%limit = s32[]{:T(128)} constant(12)", "%limit = s32[]{:T(128)} parameter(1)"),
        ("add(%gte.0, %step)", "multiply(%gte.0, %step)"),
    ],
)
def test_no_trip_count_rather_than_a_wrong_one(before, after):
    program = hlo.Program(TPU_TEXT.replace(before, after))
    main = program.computations["main.1"]
    assert program.trip_count(main["loop"], main) is None


def test_collectives_that_a_tpu_leaves_to_its_sparse_cores():
    """Called asynchronously, in a computation of their own: arithmetic hides them."""
    text = """HloModule jit_f, is_scheduled=true

%called_computation.1 (param: f32[8,4], token: token[]) -> f32[64,4] {
  %param = f32[8,4]{1,0:T(8,128)} parameter(0)
  %token = token[] parameter(1)
  ROOT %all-gather.1 = f32[64,4]{1,0:T(8,128)} all-gather(%param), GROUPS, dimensions={0}
}

ENTRY %main.1 (x: f32[8,4]) -> f32[64,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %ready = token[] after-all()
  %begun = ((f32[8,4]{1,0:T(8,128)}, token[]), f32[64,4]{1,0:T(8,128)}) call-start(%x, %ready), CALL
  ROOT %all = f32[64,4]{1,0:T(8,128)} call-done(%begun)
}
"""
    text = text.replace("GROUPS", "replica_groups={{0,1,2,3,4,5,6,7}}").replace(
        "CALL", 'async_execution_thread="sparsecore", to_apply=%called_computation.1'
    )
    found = collectives(hlo.Program(text), devices=8)
    assert found == (Collective("all-gather", 8, 1, 64 * 4 * 4 * 7 / 8, 0.0),)


def test_a_collective_that_overlaps_with_arithmetic_counts_once():
    """The compiler writes it into every fusion meanwhile, here three turns of a loop."""
    gather = "f32[64,4]{1,0} all-gather(%p0), GROUPS, dimensions={0}, CHAIN"
    text = f"""HloModule jit_f, is_scheduled=true

%begin (p0: f32[8,4]) -> (f32[8,4], f32[64,4], u32[]) {{
  %p0 = f32[8,4]{{1,0}} parameter(0)
  %all-gather.1 = {gather}
  ROOT %begun = (f32[8,4]{{1,0}}, f32[64,4]{{1,0}}, u32[]) custom-call(%all-gather.1), BEGIN
}}

%beside (p0: f32[8,4], p1: f32[64,4], p2: f32[100]) -> (f32[100], f32[8,4], f32[64,4]) {{
  %p0 = f32[8,4]{{1,0}} parameter(0)
  %p1 = f32[64,4]{{1,0}} parameter(1)
  %all-gather.2 = {gather}
  %p2 = f32[100]{{0}} parameter(2)
  %square = f32[100]{{0}} multiply(%p2, %p2)
  ROOT %all = (f32[100]{{0}}, f32[8,4]{{1,0}}, f32[64,4]{{1,0}}) tuple(%square, %p0, %all-gather.2)
}}

%end (p0: f32[8,4], p1: f32[64,4]) -> f32[64,4] {{
  %p0 = f32[8,4]{{1,0}} parameter(0)
  %p1 = f32[64,4]{{1,0}} parameter(1)
  %all-gather.3 = {gather}
  ROOT %ended = f32[64,4]{{1,0}} custom-call(%p0, %p1, %all-gather.3), END
}}

%body (arg: (f32[100], f32[8,4], f32[64,4])) -> (f32[100], f32[8,4], f32[64,4]) {{
  %arg = (f32[100]{{0}}, f32[8,4]{{1,0}}, f32[64,4]{{1,0}}) parameter(0)
  %x = f32[100]{{0}} get-tuple-element(%arg), index=0
  %a = f32[8,4]{{1,0}} get-tuple-element(%arg), index=1
  %b = f32[64,4]{{1,0}} get-tuple-element(%arg), index=2
  ROOT %f = (f32[100]{{0}}, f32[8,4]{{1,0}}, f32[64,4]{{1,0}}) fusion(%a, %b, %x), INPLACE
}}

ENTRY %main (x: f32[100], shard: f32[8,4]) -> f32[64,4] {{
  %x = f32[100]{{0}} parameter(0)
  %shard = f32[8,4]{{1,0}} parameter(1)
  %s = (f32[8,4]{{1,0}}, f32[64,4]{{1,0}}, u32[]) fusion(%shard), FIRST, calls=%begin
  %a = f32[8,4]{{1,0}} get-tuple-element(%s), index=0
  %b = f32[64,4]{{1,0}} get-tuple-element(%s), index=1
  %init = (f32[100]{{0}}, f32[8,4]{{1,0}}, f32[64,4]{{1,0}}) tuple(%x, %a, %b)
  %loop = (f32[100]{{0}}, f32[8,4]{{1,0}}, f32[64,4]{{1,0}}) while(%init), body=%body, TURNS
  %c = f32[8,4]{{1,0}} get-tuple-element(%loop), index=1
  %d = f32[64,4]{{1,0}} get-tuple-element(%loop), index=2
  ROOT %done = f32[64,4]{{1,0}} fusion(%c, %d), LAST, calls=%end
}}
"""
    for short, long in {
        "GROUPS": "replica_groups={{0,1,2,3,4,5,6,7}}",
        "CHAIN": 'frontend_attributes={chain_id="0"}',
        "BEGIN": 'custom_call_target="AsyncCollectiveStart"',
        "END": 'custom_call_target="AsyncCollectiveDone"',
        "INPLACE": "kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, "
        "calls=%beside",
        "FIRST": "kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}",
        "LAST": "kind=kCustom, output_to_operand_aliasing={{}: (1, {})}",
        "TURNS": 'backend_config={"known_trip_count":{"n":"3"}}',
    }.items():
        text = text.replace(short, long)
    found = collectives(hlo.Program(text), devices=8)
    assert found == (Collective("all-gather", 8, 1, 64 * 4 * 4 * 7 / 8, 0.0),)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups={}", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", 2),
    ],
)
def test_group_sizes(text, group):
    line = f"  %r = f32[4]{{0}} all-reduce(%x), channel_id=1, {text}, to_apply=%add\n"
    program = f"ENTRY %main () -> f32[4] {{\n  %x = f32[4]{{0}} parameter(0)\n{line}}}\n"
    [found] = collectives(hlo.Program(program), devices=8)
    assert (found.group, found.sent_bytes) == (group, 2 * 16 * (group - 1) / group)

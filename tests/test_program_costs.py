"""Costs read from the text of compiled programs: loops as often as they run, collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from mofi_jax.distributed import meshes
from mofi_jax.plan import costs
from mofi_jax.plan.costs import Collective

# As the TPU compiler writes loops: no note of the number of turns, counters behind copies; and
# products: a batch of them as one convolution over a dilated dimension.
TPU_TEXT = """HloModule jit_f, is_scheduled=true

%body.1 (arg: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %arg = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %step = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%gte.0, %step), backend_config={"flag_configs":[]}
  %gte.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=1
  %square = bf16[4,4]{1,0:T(8,128)(2,1)} constant({...})
  %product = bf16[8,4]{1,0:T(8,128)(2,1)} convolution(%gte.1, %square), dim_labels=bf_io->bf
  ROOT %result = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%next, %product)
}

%until.1 (arg.1: (s32[], bf16[8,4])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %gte.2 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%gte.2, %limit), direction=LT
}

ENTRY %main.1 (x: bf16[8,4], a: f32[3,5,7], b: f32[3,7,2]) -> (bf16[8,4], f32[3,5,2]) {
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %a = f32[3,5,7]{2,1,0:T(8,128)} parameter(1)
  %b = f32[3,7,2]{2,1,0:T(8,128)} parameter(2)
  %zero = s32[]{:T(128)} constant(3)
  %start = s32[]{:T(128)} copy(%zero)
  %init = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%start, %x)
  %loop = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)}) while(%init), condition=%until.1, body=%body.1
  %last = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %sum = bf16[8,4]{1,0:T(8,128)(2,1)} all-reduce(%last), GROUPS, to_apply=%add
  %batched = f32[3,5,2]{2,1,0:T(8,128)} convolution(%a, %b), WINDOW
  ROOT %out = (bf16[8,4]{1,0:T(8,128)(2,1)}, f32[3,5,2]{2,1,0:T(8,128)}) tuple(%sum, %batched)
}
"""
TPU_TEXT = TPU_TEXT.replace(
    "GROUPS", "channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}"
).replace(
    "WINDOW",
    "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf, "
    "operand_precision={highest,highest}",
)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def test_a_scan_counts_as_often_as_it_runs():
    def scan(x, weights):
        return lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    program = compiled(scan, jnp.ones((8, 16)), jnp.ones((20, 16, 16)))
    found = costs.costs(program.as_text(), devices=1)
    assert found.flops == 20 * 2 * 8 * 16 * 16
    assert found.flops_once == found.flops / 20
    assert found.passes == found.flops
    assert found.unknown_loops == 0
    # A turn reads its own weights, not those of all turns: three times where they are copied first.
    weights, rows = 16 * 16 * 4, 8 * 16 * 4
    assert 20 * (weights + 2 * rows) <= found.hbm_bytes <= 20 * (3 * weights + 5 * rows)


def test_nested_loops_multiply():
    def nested(x, w):
        inner = lambda _, x: x @ w  # noqa: E731
        return lax.fori_loop(0, 3, lambda _, x: lax.fori_loop(0, 5, inner, x), x)

    program = compiled(nested, jnp.ones((8, 8)), jnp.ones((8, 8)))
    assert costs.costs(program.as_text(), devices=1).flops == 15 * 2 * 8**3


def test_a_loop_of_unknown_length_is_told():
    def search(x, w):
        return lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ w, x)

    program = compiled(search, jnp.ones((8, 8)), jnp.ones((8, 8)))
    found = costs.costs(program.as_text(), devices=1)
    assert (found.unknown_loops, found.flops) == (1, 2 * 8**3)


def test_products_agree_with_xla():
    def products(x, kernel, a, b):
        y = lax.conv_general_dilated(x, kernel, (2, 1), [(1, 2), (0, 0)], lhs_dilation=(1, 3))
        return y, jnp.einsum("bij,bjk->bik", a, b)

    x, kernel = jnp.ones((2, 4, 9, 11)), jnp.ones((6, 4, 3, 2))
    a, b = jnp.ones((3, 5, 7)), jnp.ones((3, 7, 2))
    program = compiled(products, x, kernel, a, b)
    found = costs.costs(program.as_text(), devices=1)
    assert found.flops == pytest.approx(program.cost_analysis()["flops"], rel=1e-6)


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
    found = costs.costs(compiled(run, x).as_text(), devices=8).collectives
    whole = 64 * 32 * 4
    by_kind = {c.kind: c for c in found}
    assert by_kind["all-gather"] == Collective("all-gather", 4, 1, whole, whole * 3 / 4)
    assert by_kind["all-reduce"] == Collective("all-reduce", 2, 5, 5 * whole, 5.0 * whole)
    scattered = by_kind["reduce-scatter"]
    assert (scattered.group, scattered.sent_bytes) == (8, whole * 7 / 8)
    assert [c.sent_bytes for c in found] == sorted((c.sent_bytes for c in found), reverse=True)


def test_permutations_are_sent_whole(mesh_of):
    def shard(x):
        return lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)])

    spec = P(meshes.BATCH_AXES)
    run = jax.shard_map(shard, mesh=mesh_of["1x8x1"], in_specs=spec, out_specs=spec)
    text = compiled(run, jax.ShapeDtypeStruct((64, 32), jnp.float32)).as_text()
    [found] = costs.costs(text, devices=8).collectives
    assert (found.kind, found.sent_bytes) == ("collective-permute", 8 * 32 * 4)


def test_the_text_of_the_tpu_compiler():
    found = costs.costs(TPU_TEXT, devices=8)
    turns = 5  # 3, 5, 7, 9, 11
    in_loop, batched = 2 * 8 * 4 * 4, 3 * 2 * 5 * 7 * 2
    assert found.unknown_loops == 0
    assert found.flops == turns * in_loop + batched
    assert found.flops_once == in_loop + batched
    assert found.passes == turns * in_loop + 6 * batched
    sent = 2 * 64 * 3 / 4
    assert found.collectives == (Collective("all-reduce", 4, 1, 64, sent),)
    # A turn reads the weights, writes the product, whose other operand is not in HBM, and counts.
    once = 4 * (3 * 5 * 7 + 3 * 7 * 2 + 3 * 5 * 2) + 2 * 64 + 2 * 4
    assert found.hbm_bytes == turns * (32 + 64 + 3 * 4) + once


def test_collectives_that_a_tpu_leaves_to_its_sparse_cores():
    """Called asynchronously, in a computation of their own: counted once, with its traffic."""
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
    found = costs.costs(text, devices=8)
    gathered = 64 * 4 * 4
    assert found.collectives == (Collective("all-gather", 8, 1, gathered, gathered * 7 / 8),)
    assert found.hbm_bytes == gathered + gathered / 8


def test_a_slice_fetched_ahead_is_read_alone():
    text = """HloModule jit_f, is_scheduled=true

ENTRY %main.1 (x: bf16[64,8]) -> bf16[16,8] {
  %x = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %begun = ((bf16[64,8]{1,0}), bf16[16,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:16]}
  ROOT %done = bf16[16,8]{1,0:S(1)} slice-done(%begun)
}
"""
    assert costs.costs(text, devices=1).hbm_bytes == 16 * 8 * 2


def test_a_collective_that_goes_on_beside_arithmetic_counts_once():
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
    found = costs.costs(text, devices=8)
    gathered = 64 * 4 * 4
    assert found.collectives == (Collective("all-gather", 8, 1, gathered, gathered * 7 / 8),)
    squares = 3 * 2 * 100 * 4
    # Written as it begins; its own part is read as it ends, and so is a counter of 4 bytes.
    assert squares + gathered <= found.hbm_bytes <= squares + gathered + gathered / 8 + 4


def test_fusions_touch_slices_of_what_they_are_given():
    """One layer of a stack is read, inside a fusion of a fusion; one is written in its place."""
    text = """
%inner (p.0: f32[9,64], p.1: s32[]) -> f32[1,64] {
  %p.0 = f32[9,64]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %none = s32[] constant(0)
  ROOT %slice = f32[1,64]{1,0} dynamic-slice(%p.0, %p.1, %none), dynamic_slice_sizes={1,64}
}

%outer (q.0: f32[9,64], q.1: f32[9,64], q.2: s32[]) -> f32[9,64] {
  %q.0 = f32[9,64]{1,0} parameter(0)
  %q.1 = f32[9,64]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %layer = f32[1,64]{1,0} fusion(%q.0, %q.2), kind=kLoop, calls=%inner
  %zero = s32[] constant(0)
  ROOT %put = f32[9,64]{1,0} dynamic-update-slice(%q.1, %layer, %q.2, %zero)
}

ENTRY %main (a: f32[9,64], b: f32[9,64], i: s32[]) -> f32[9,64] {
  %a = f32[9,64]{1,0} parameter(0)
  %b = f32[9,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %both = f32[9,64]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%outer
}
"""
    layer, index = 64 * 4, 4
    assert costs.costs(text, devices=1).hbm_bytes == 2 * layer + index


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
    [found] = costs.costs(program, devices=8).collectives
    np.testing.assert_allclose([found.group, found.result_bytes], [group, 16])

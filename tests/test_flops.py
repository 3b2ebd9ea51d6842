"""FLOPs counted by hand against XLA's own count of the compiled program."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import mofi as mofi_config
from configs import quickstart
from mofi_jax.telemetry import flops
from mofi_jax.training import setup, state, step


def built(mesh, task, *, batch_size=16, entities=4096, microbatches=1, **options):
    """Wide and short, so that products outweigh the rest; up to four blocks are no loop."""
    config = quickstart.get_config(f"task={task}")
    config.batch_size, config.microbatches = batch_size, microbatches
    config.model.update(
        {
            "image_size": 48,
            "patch_size": 8,
            "image": {"width": 256, "layers": 3, "heads": 4},
            "text": {"width": 192, "layers": 2, "heads": 3},
            "embed_dim": 128,
            "context_length": 24,
        }
    )
    for name, value in options.items():
        config.losses.entity[name] = value
    sizes = {"vocab_size": 100, "eos_id": 99, "examples_per_epoch": 1000}
    return config, setup.make(config, mesh, num_entities=entities, **sizes)


def xla_flops(config, made, mesh):
    """Of the losses and all gradients, on one device."""
    structs, _ = state.abstract(made.init, mesh)
    batch = setup.batch_structs(config, mesh)
    loss = step.make_loss(made.context)
    compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(structs.params, batch).compile()
    # One that scatters has no product in it.
    loops = [line for line in compiled.as_text().splitlines() if " while(" in line]
    assert all("scatter" in line for line in loops), "XLA counts the body of a loop once"
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("task", ["supervised", "contrastive", "multitask"])
def test_agrees_with_xla(task, mesh_of):
    config, made = built(mesh_of["1x1x1"], task)
    counted = flops.of_step(made.context, batch_size=config.batch_size)
    expected = xla_flops(config, made, mesh_of["1x1x1"])
    # What is no product (norms, softmax, GELU) is XLA's alone.
    assert 0.95 * expected <= sum(counted.values()) <= expected
    assert (counted["text"] > 0) == (counted["pairs"] > 0) == (task != "supervised")
    assert (counted["classes"] > 0) == (task != "contrastive")


def test_class_table_agrees_with_xla(mesh_of):
    """As the difference between two vocabularies; batches so large that rows' norms are little."""
    mesh = mesh_of["1x1x1"]
    totals, counts = [], []
    for entities in (2048, 8192):
        config, made = built(mesh, "supervised", batch_size=128, entities=entities)
        totals.append(xla_flops(config, made, mesh))
        counts.append(flops.of_step(made.context, batch_size=config.batch_size))
    difference = counts[1]["classes"] - counts[0]["classes"]
    assert difference == 6 * config.batch_size * 6144 * config.model.embed_dim
    assert totals[1] - totals[0] == pytest.approx(difference, rel=0.1)


def test_microbatches_and_devices_change_nothing(mesh_of):
    _, one = built(mesh_of["1x1x1"], "multitask")
    _, many = built(mesh_of["1x8x1"], "multitask", microbatches=2)
    a, b = (flops.of_step(p.context, batch_size=16) for p in (one, many))
    assert a == b


def test_frozen_towers_and_sampled_classes(mesh_of):
    _, made = built(mesh_of["1x8x1"], "multitask", entities=80_000)
    whole = flops.of_step(made.context, batch_size=32)
    context = dataclasses.replace(made.context, frozen=("image",))
    frozen = flops.of_step(context, batch_size=32)
    assert frozen["image"] == 32 * flops.image_forward(made.context.model)
    assert frozen == whole | {"image": frozen["image"]}
    _, sampled = built(mesh_of["1x8x1"], "multitask", entities=80_000, sample_rate=0.1)
    part = flops.of_step(sampled.context, batch_size=32)
    np.testing.assert_allclose(part["classes"], 0.1 * whole["classes"], rtol=1e-3)


@pytest.mark.parametrize(
    ("variant", "gigaflops"), [("B/16", 35.13), ("L/14", 162.03), ("H/14", 334.59)]
)
def test_published_forward_passes(variant, gigaflops, mesh_of):
    """open_clip's model_profile.csv."""
    config = mofi_config.get_config(f"variant={variant}")
    sizes = {"vocab_size": 50_272, "eos_id": 2, "num_entities": 1, "examples_per_epoch": 1}
    made = setup.make(config, mesh_of["1x1x1"], **sizes)
    assert flops.image_forward(made.context.model) / 1e9 == pytest.approx(gigaflops, rel=0.01)

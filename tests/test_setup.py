"""The parts of a step from a config: the batch is the stream's, one step of them runs."""

import itertools

import jax
import pytest

from configs import quickstart
from mofi_jax.common.errors import BadInput
from mofi_jax.data import pipeline, records, tokenizer
from mofi_jax.distributed import global_batch, sharding
from mofi_jax.training import setup, state, step
from tests import datasets


def small_config(folder):
    config = quickstart.get_config("task=multitask")
    config.batch_size = 16
    config.model.update(
        {
            "image_size": 16,
            "image": {"width": 16, "layers": 1, "heads": 2},
            "text": {"width": 8, "layers": 1, "heads": 2},
            "embed_dim": 8,
        }
    )
    config.data.update({"dir": str(folder), "train_ops": "decode|new_view(16)"})
    return config


def test_one_step_of_what_the_stream_gives(tmp_path, mesh_of):
    mesh = mesh_of["1x2x1"]
    config = small_config(tmp_path)
    datasets.write(tmp_path, name=config.data.name)
    source = records.open_source(tmp_path, config.data.name)
    entities = records.read_entities(source.directory / records.ENTITIES_FILE)
    path = source.directory / records.TOKENIZER_FILE
    texts = tokenizer.Tokenizer(path, config.model.context_length)
    built = setup.make(
        config,
        mesh,
        vocab_size=texts.vocab_size,
        eos_id=texts.eos_id,
        num_entities=len(entities),
        examples_per_epoch=len(source),
    )
    builder = pipeline.ExampleBuilder(
        image_ops=config.data.train_ops,
        text_sources=config.data.text_sources.to_dict(),
        tokenizer_path=str(path),
        context_length=config.model.context_length,
        entities=entities,
        max_labels=config.data.max_labels,
    )
    options = {"seed": 0, "start": 0, "threads": 1, "workers": 0}
    parts = [pipeline.Part("i2e", source)]
    stream = pipeline.training_stream(parts, builder, batch_size=config.batch_size, **options)
    [batch] = itertools.islice(stream, 1)
    batch = global_batch.to_global(mesh, batch)
    described = setup.batch_structs(config, mesh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), batch) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), described
    )

    first, shardings = state.create(built.init, config.seed, mesh)
    after, values = step.make_train_step(built.context, built.tx, shardings)(first, batch)
    assert int(after.step) == 1
    assert float(values["labelled_share"]) > 0
    assert after.params[sharding.ENTITY_TABLE].shape[0] >= built.context.num_entities


def test_every_device_computes_its_share(mesh_of):
    """Rows are split over the devices that the weights are split over: nothing is done twice."""
    config = quickstart.get_config("task=multitask")
    config.batch_size = 64
    config.model.update(
        {
            "image": {"width": 64, "layers": 6, "heads": 2},
            "text": {"width": 64, "layers": 6, "heads": 2},
            "remat": "full",
        }
    )

    def flops(mesh):
        sizes = {"vocab_size": 100, "eos_id": 99, "num_entities": 1000, "examples_per_epoch": 1000}
        built = setup.make(config, mesh, **sizes)
        structs, shardings = state.abstract(built.init, mesh)
        batch = setup.batch_structs(config, mesh)
        train_step = step.make_train_step(built.context, built.tx, shardings)
        compiled = train_step.lower(structs, batch).compile()
        return compiled.cost_analysis()["flops"]

    whole = flops(mesh_of["1x1x1"])
    assert whole / 8 <= flops(mesh_of["1x8x1"]) <= 1.1 * whole / 8


def test_without_the_entity_loss_there_is_no_table(mesh_of):
    config = quickstart.get_config("task=contrastive")
    built = setup.make(
        config,
        mesh_of["1x8x1"],
        vocab_size=100,
        eos_id=99,
        num_entities=1000,
        examples_per_epoch=1000,
    )
    structs, _ = state.abstract(built.init, mesh_of["1x8x1"])
    assert built.context.num_entities == 0
    assert sharding.ENTITY_TABLE not in structs.params


def test_batch_must_divide(mesh_of):
    config = quickstart.get_config()
    config.batch_size, config.microbatches = 40, 2
    with pytest.raises(BadInput, match=r"batch_size=40 .* 8 devices .* choose a multiple of 16"):
        setup.check_batch(config, mesh_of["1x8x1"])
    config.batch_size = 48
    setup.check_batch(config, mesh_of["1x8x1"])

"""A run that begins with another's parameters: parts, other resolution, other vocabulary."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mofi_jax import train
from mofi_jax.common.errors import BadInput
from mofi_jax.data import records
from mofi_jax.distributed import meshes, sharding
from mofi_jax.inference import warm_start
from mofi_jax.losses import class_order
from mofi_jax.model import image
from mofi_jax.training import checkpoint
from tests import datasets

TABLE = sharding.ENTITY_TABLE


@pytest.fixture(autouse=True)
def one_device(monkeypatch, mesh_of):
    monkeypatch.setattr(meshes, "make_mesh", lambda **_: mesh_of["1x1x1"])


@pytest.fixture(scope="module")
def world(tmp_path_factory, trained):
    """A trained run of seven entities; data of nine, five of them the old ones with other ids."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "old").symlink_to(trained / "data")
    (folder / "run").symlink_to(trained / "run")
    old = folder / "old" / "i2e" / records.VERSION
    new = datasets.write(folder / "new", entities=9)
    (new / records.TOKENIZER_FILE).write_bytes((old / records.TOKENIZER_FILE).read_bytes())
    known = records.read_entities(new / records.ENTITIES_FILE)
    qids = ["Q003", "Q900", "Q000", "Q006", "Q901", "Q001", "Q902", "Q005", "Q903"]
    records.write_entities(
        new / records.ENTITIES_FILE,
        dataclasses.replace(known, qids=qids, counts=np.arange(30, 21, -1)),
    )
    return folder


def start(world, tmp_path, data="old", **changes):
    """The parameters with which a run begins that is warm-started: it trains with a rate of 0."""
    config = datasets.tiny_config(world / data, steps=1)
    config.init.model = str(world / "run")
    config.optimizer.learning_rate = 1e-30
    config.optimizer.warmup = "0 steps"
    config.update_from_flattened_dict(changes)
    train.main(config, str(tmp_path / "warm"))
    return checkpoint.restore_params(tmp_path / "warm")


def flat(tree):
    return {
        sharding.path_name(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def test_everything_is_taken_over(world, tmp_path):
    ours, theirs = flat(start(world, tmp_path)), flat(checkpoint.restore_params(world / "run"))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_only_the_parts_that_are_named(world, tmp_path):
    ours = flat(start(world, tmp_path, **{"init.parts": ("image", "text/blocks")}))
    theirs = flat(checkpoint.restore_params(world / "run"))
    for name, value in theirs.items():
        taken = name.startswith(("image/", "text/blocks/"))
        # Some parameters begin as the same constant in every run.
        if taken or np.std(value) > 1e-6:
            assert np.array_equal(ours[name], value) == taken, name


def test_rows_move_with_their_entities(world, tmp_path):
    ours = flat(start(world, tmp_path, data="new"))[TABLE]
    theirs = flat(checkpoint.restore_params(world / "run"))[TABLE]
    old = records.read_entities(world / "run" / records.ENTITIES_FILE).qids
    new = records.read_entities(tmp_path / "warm" / records.ENTITIES_FILE).qids
    their_rows = dict(zip(old, theirs[class_order.table_rows(np.arange(7), 7)], strict=True))
    our_rows = dict(zip(new, ours[class_order.table_rows(np.arange(9), 9)], strict=True))
    assert len(set(old) & set(new)) == 5
    for qid, row in our_rows.items():
        if qid in their_rows:
            np.testing.assert_array_equal(row, their_rows[qid])
        else:
            # As the table begins without another model: small, and no row of theirs.
            assert 0 < np.linalg.norm(row) < 0.1
            assert not any(np.array_equal(row, other) for other in theirs)


def test_rows_on_eight_devices(world, tmp_path, mesh_of):
    """Each device fills its own rows, padding included."""
    mesh = mesh_of["2x2x2"]
    entities = records.read_entities(world / "new" / "i2e" / records.VERSION / "entities.parquet")
    sharding = jax.NamedSharding(mesh, jax.P(meshes.ALL_AXES, None))
    table = jax.device_put(-jnp.ones((16, 12)), sharding)
    structs = {TABLE: jax.ShapeDtypeStruct((16, 12), jnp.float32, sharding=sharding)}
    source = warm_start.read(str(world / "run"), (TABLE,), structs, entities)
    state = train.state.TrainState(jnp.int32(0), {TABLE: table}, {}, {TABLE: table})
    filled = warm_start.apply(state, source)
    assert filled.params[TABLE].sharding == sharding
    values = np.asarray(filled.params[TABLE])
    theirs = flat(checkpoint.restore_params(world / "run"))[TABLE]
    assert (values != -1).all(axis=1).sum() == 5
    for row, source_row in enumerate(source.table_rows):
        expected = theirs[source_row] if source_row >= 0 else -np.ones(12)
        np.testing.assert_array_equal(values[row], expected)
    np.testing.assert_array_equal(values[9:], -1)
    np.testing.assert_array_equal(np.asarray(filled.ema[TABLE]), values)


def test_another_resolution(world, tmp_path):
    """24 pixels in place of 16: positions of a 3 x 3 grid from those of 2 x 2."""
    size = {
        "model.image_size": 24,
        "data.train_ops": "clip_hf",
        "data.eval_ops": "clip_hf",
    }
    ours = flat(start(world, tmp_path, **size))[warm_start.IMAGE_POSITIONS]
    theirs = flat(checkpoint.restore_params(world / "run"))[warm_start.IMAGE_POSITIONS]
    assert (theirs.shape[0], ours.shape[0]) == (5, 10)
    np.testing.assert_array_equal(ours, image.resampled(theirs, 10))
    np.testing.assert_array_equal(ours[0], theirs[0])


def test_resampling_keeps_what_varies_slowly():
    """A plane over the grid is a plane over the finer one; torch's bicubic agrees inside."""
    import torch

    rng = np.random.default_rng(0)
    old = rng.normal(size=(1 + 49, 6)).astype(np.float32)
    grid = torch.tensor(old[1:]).reshape(1, 7, 7, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid, size=(14, 14), mode="bicubic", antialias=True, align_corners=False
    )
    ours = image.resampled(old, 1 + 196)[1:].reshape(14, 14, 6)
    theirs = expected[0].permute(1, 2, 0).numpy()
    # At the rim the two weigh what is missing differently.
    np.testing.assert_allclose(ours[4:-4, 4:-4], theirs[4:-4, 4:-4], atol=1e-5)
    np.testing.assert_array_equal(image.resampled(old, 50), old)


def test_what_does_not_fit_is_told_at_once(world, tmp_path):
    with pytest.raises(BadInput) as caught:
        start(
            world,
            tmp_path,
            **{
                "model.image.width": 32,
                "model.context_length": 20,
                "init.parts": ("image", "text", "sound"),
            },
        )
    told = str(caught.value)
    for part in (
        "that model has no part 'sound'",
        "this one has no part 'sound'",
        "image/class_embedding is (16,) there and (32,) here",
        "text/position_embedding is (12, 16) there and (20, 16) here",
    ):
        assert part in told
    assert not (tmp_path / "warm").exists()


def test_token_embeddings_of_another_tokenizer(world, tmp_path):
    """They would have the right shape, and mean something else."""
    data = shutil.copytree(world / "old", tmp_path / "data")
    path = data / "i2e" / records.VERSION / records.TOKENIZER_FILE
    path.write_text(path.read_text() + "\n")
    with pytest.raises(BadInput, match=r"its tokens are not those of .*tokenizer.json, over which"):
        start(world, tmp_path, data=data)
    start(world, tmp_path, data=data, **{"init.parts": ("image",)})


def test_a_folder_that_is_no_model(world, tmp_path):
    with pytest.raises(BadInput, match="is neither a training run"):
        start(world, tmp_path, **{"init.model": str(tmp_path)})


def test_a_resumed_run_does_not_start_again(world, tmp_path):
    """The other model may be gone by then."""
    config = datasets.tiny_config(world / "old", steps=2)
    config.init.model = str(world / "run")
    train.main(config, str(tmp_path / "warm"))
    config.total, config.init.model = "4 steps", str(world / "gone")
    train.main(config, str(tmp_path / "warm"))
    assert checkpoint.saved_steps(tmp_path / "warm")[-1] == 4

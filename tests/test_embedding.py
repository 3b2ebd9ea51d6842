"""Features of picture sets: each picture decoded once, on the host whose devices hold its row."""

import threading

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh

from mofi_jax import inference
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.distributed import meshes
from mofi_jax.evaluators.features import embedding
from mofi_jax.evaluators.features.embedding import Embedder
from mofi_jax.evaluators.sets.pictures import PictureSet
from mofi_jax.model import mofi
from tests import test_classification

DIM = 3


def numbered(size):
    """Picture i is the number i."""
    names = tuple(f"0_{i}.jpg" for i in range(size))
    classes = np.zeros(size, np.int64)
    return PictureSet(epath.Path("numbers"), names, classes, lambda i: str(i).encode())


def features_of(numbers):
    return np.stack([numbers, np.sqrt(numbers + 1.0), numbers % 7 - 3], 1).astype(np.float32)


class Towers:
    """Pictures are numbers, and numbers have features."""

    def __init__(self, mesh, broken=()):
        self.mesh, self.broken, self.decoded, self.batches = mesh, broken, [], []
        self.texts, self.lock = 0, threading.Lock()

    def decode(self, data):
        with self.lock:
            self.decoded.append(int(data))
        if int(data) in self.broken:
            raise ops.UndecodableImage("not a picture")
        return np.array([int(data)], np.int32)

    def embed_images(self, params, images):
        self.batches.append(images.shape)
        return features_of(np.asarray(images)[:, 0])

    def embed_texts(self, params, texts):
        self.texts += 1
        return np.array([[float(text)] for text in texts], np.float32)


def permuted(mesh):
    devices = mesh.devices.ravel()[[3, 6, 0, 5, 1, 7, 2, 4]].reshape(mesh.devices.shape)
    return Mesh(devices, meshes.ALL_AXES, axis_types=mesh.axis_types)


@pytest.mark.parametrize("mesh", ["1x1x1", "1x8x1", "2x2x2", "permuted"])
def test_last_batches_of_every_size(mesh_of, mesh):
    """Batches of two on each device: one to 34 pictures fill one to three batches of eight."""
    mesh = permuted(mesh_of["2x2x2"]) if mesh == "permuted" else mesh_of[mesh]
    for size in range(1, 35) if mesh.size == 8 else range(1, 6):
        towers = Towers(mesh)
        pictures = numbered(size)
        found = Embedder(towers, {}, 2).pictures(pictures)
        np.testing.assert_array_equal(found.numpy(), features_of(np.arange(size)))
        assert sorted(towers.decoded) == list(range(size))
        assert pictures.known["sha256"] == numbered(size).sha256()
        assert set(towers.batches) == {(2 * mesh.size, 1)}
        # What is beyond the last picture is zero, and no device holds more than its share.
        assert not np.asarray(found.rows)[size:].any()
        held = -(-size // mesh.size)
        assert {shard.data.shape for shard in found.rows.addressable_shards} == {(held, DIM)}


def test_sets_and_texts_are_embedded_once(mesh_of):
    towers = Towers(mesh_of["1x1x1"])
    embedder = Embedder(towers, {})
    once = embedder.pictures(numbered(5))
    again = numbered(5)
    assert embedder.pictures(again) is once
    assert again.known["sha256"] == numbered(5).sha256()
    # Another part of what lies at one path is another set.
    assert len(embedder.pictures(numbered(3))) == 3
    assert len(towers.decoded) == 8
    assert embedder.texts(["1", "2"]) is embedder.texts(["1", "2"])
    assert embedder.texts(["2", "1"])[0] == 2
    assert towers.texts == 2
    with pytest.raises(BadInput, match=r"features of 'nan' are not finite \(row 1\)"):
        embedder.texts(["0", "nan"])


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2"])
def test_a_picture_that_cannot_be_decoded_stays_and_has_a_random_feature(mesh_of, mesh):
    towers, pictures = Towers(mesh_of[mesh], broken=(7, 30)), numbered(40)
    embedder = Embedder(towers, {}, 1)
    found = embedder.pictures(pictures).numpy()
    broken = np.isin(np.arange(40), (7, 30))
    np.testing.assert_array_equal(found[~broken], features_of(np.flatnonzero(~broken)))
    np.testing.assert_allclose(np.linalg.norm(found[broken], axis=1), 1, rtol=1e-6)
    # As far from each other as from anything: a class that is all broken finds nothing by that.
    assert abs(found[7] @ found[30]) < 0.99
    # The same on any mesh, and for any model of as many numbers.
    own = numbered(40).sha256()
    expected = np.stack([embedding._random(f"{own} 0_{i}.jpg", DIM) for i in (7, 30)])
    np.testing.assert_array_equal(found[broken], expected)
    # Named and counted, for every evaluator that asks for the set.
    assert pictures.known["sha256"] == numbered(40).sha256()
    again = numbered(40)
    embedder.pictures(again)
    towers.preprocess = "none"
    assert embedding.picture_card(towers, again)["undecodable"] == {
        "pictures": 2,
        "names": ["0_7.jpg", "0_30.jpg"],
        "feature": "random",
    }
    whole = numbered(3)
    assert "undecodable" not in embedding.picture_card(towers, whole)  # nobody has looked
    embedder.pictures(whole)
    assert embedding.picture_card(towers, whole)["undecodable"] == {"pictures": 0}
    # What has its name in another set is not found there.
    other = embedder.pictures(numbered(8)).numpy()
    assert abs(other[7] @ found[7]) < 0.99
    # All that lies at one path is told, whatever part of it was asked for last.
    assert embedder.undecodable() == {"numbers": ["0_7.jpg", "0_30.jpg"]}


def test_a_set_without_any_picture_and_other_faults_end_it_when_all_hosts_have_finished(mesh_of):
    towers = inference.RawPixels(8, mesh_of["1x8x1"])
    with pytest.raises(BadInput, match=r"^None of the 40 pictures of numbers .*0_0.jpg.*: fetch"):
        Embedder(towers, {}, 1).pictures(numbered(40))

    def read(i):
        raise PermissionError(13, "Permission denied")

    pictures = PictureSet(epath.Path("set"), ("0_a.jpg",), np.zeros(1, np.int64), read)
    with pytest.raises(BadInput, match=r"^0_a.jpg in set cannot be read \(Permission denied\): co"):
        Embedder(towers, {}).pictures(pictures)

    towers = Towers(mesh_of["1x8x1"])
    towers.decode = {b"0": np.zeros(1, np.int32)}.__getitem__  # no fault of the picture
    with pytest.raises(KeyError):
        Embedder(towers, {}).pictures(numbered(2))
    with pytest.raises(BadInput, match="batch size is 0"):
        Embedder(towers, {}, 0)


def test_one_program_for_sets_of_all_sizes(mesh_of):
    """Real towers, and the baseline: what lies on the devices stays there."""
    config, rng, mesh = test_classification.CONFIG, np.random.default_rng(0), mesh_of["2x2x2"]
    shapes = jax.eval_shape(lambda key: mofi.create(config, key), jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0.1, 0.4, x.shape).astype(np.float32), shapes)
    towers = inference.Towers(config, None, None, "none", permuted(mesh))
    params = towers.put(params)
    images = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
    for model in (towers, inference.RawPixels(config.image_size, permuted(mesh))):
        expected = np.asarray(model.embed_images(params, images))
        object.__setattr__(model, "decode", lambda data: images[int(data)])
        embedder = Embedder(model, params, 2)
        for size in (40, 3, 17):
            found = embedder.pictures(numbered(size)).numpy()
            np.testing.assert_allclose(found, expected[:size], atol=1e-6)
    assert towers._split_step._cache_size() == 1

"""Data sets of TFDS with anything done to them: pairs and rejects or one sentence."""

import json
import tempfile

import pytest
from etils import epath
from hypothesis import strategies as st

from data_prep import engine
from data_prep.pairs import stage as pairs_stage
from data_prep.pairs.formats import tfds_sets
from mofi_jax.common import errors
from mofi_jax.data import records
from tests import datasets
from tests.fuzzing import altered, fuzz, mutated
from tests.inputs import make_config, picture, read

TOKENS = [
    b"\x00",
    b"\xff" * 9,
    b"\x0a\x03",
    b"key",
    b"text",
    b"image",
    b"\x1a",
    b"\x12",
    b"{",
    b'"',
]
TOKENS += [b"1" * 30, b"-1", b"null", b"../", b"{SPLIT}", b"\\u0000", b"\\ud800"]
RECORDS = [
    records.serialize(
        {
            **{
                "key": str(number),
                "image": picture(kind="jpeg"),
                "text": "a cat",
                "source": "tests",
            },
            **{"width": 40, "height": 40, "entity_ids": [], "entity_scores": []},
        }
    )
    for number in range(2)
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The files of a data set, by name."""
    folder = tmp_path_factory.mktemp("tfds")
    version = datasets.write(folder, name="i2t", examples=2, shards=1)
    datasets.write_shard(version / records.shard_name("i2t", "train", 0, 1), RECORDS)
    names = ("dataset_info.json", "features.json", records.shard_name("i2t", "train", 0, 1))
    return {name: (version / name).read_bytes() for name in names}


def check(files):
    with tempfile.TemporaryDirectory() as name:
        folder = epath.Path(name)
        (folder / "i2t/1.0.0").mkdir(parents=True)
        for name, data in files.items():
            (folder / "i2t/1.0.0" / name).write_bytes(data)
        try:
            config = make_config(f"tfds:i2t@{folder}", rows_per_shard=1_000)
            manifests = pairs_stage.run(config, engine.Engine(folder / "w"))
        except errors.BadInput as error:
            assert str(error).endswith(".")  # noqa: PT017  an answer as well
            return
        counts = engine.total_counts(manifests)
        assert counts["pairs"] + counts["rejected"] == counts["members"]
        pairs, rejects = read(folder / "w")
        assert len(pairs) == counts["pairs"]
        assert all(reason.isidentifier() for reason in rejects.values())


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@fuzz(12, data=st.data())
def test_metadata_with_another_value_anywhere(sound, name, data):
    content = data.draw(altered(json.loads(sound[name])))
    check(sound | {name: json.dumps(content).encode()})


@fuzz(12, data=st.data())
def test_damaged_files(sound, data):
    name = data.draw(st.sampled_from(sorted(sound)))
    check(sound | {name: data.draw(mutated([sound[name]], TOKENS))})


@fuzz(12, data=st.data())
def test_records_of_another_form(sound, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("shard") / "shard"
    datasets.write_shard(path, [data.draw(mutated(RECORDS, TOKENS)), RECORDS[1]])
    [name] = [name for name in sound if tfds_sets.is_shard(name)]
    check(sound | {name: path.read_bytes()})

"""Kinship against plain numpy, in a small base of birds and machines."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import engine
from data_prep.selection import senses, visibility, z_scores

# Row: id, parents. "crane" means 1 and 3, "heron" 2, "derrick" 4; 5 is alone, 0 no candidate.
BASE = {
    "whooper": ["bird"],
    "crane": ["wader"],
    "heron": ["wader"],
    "crane2": ["machine"],
    "derrick": ["machine"],
    "mood": [],
    "wader": ["bird"],
    "bird": ["thing"],
    "machine": ["thing"],
    "thing": [],
}
NAMES = [[1, 3], [2], [4], [5], [6]]
ENTITIES = [4, 1, 3, 2, 5, 6]  # by place: of the texts


@pytest.fixture
def workdir(tmp_path):
    rng = np.random.default_rng(3)
    for stage in ("kb", "candidates", "texts", "moments", "prototypes"):
        (tmp_path / stage).mkdir()
    none = [[]] * len(BASE)
    columns = {"qid": [*BASE], "hypernyms": [*BASE.values()], "types": none}
    lists = dict.fromkeys(("hypernyms", "types"), pa.list_(pa.string()))
    arrays = {name: pa.array(values, lists.get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), tmp_path / "kb/entities.parquet")
    np.save(tmp_path / "kb/alias_offsets.npy", np.cumsum([0, *map(len, NAMES)]))
    np.save(tmp_path / "kb/cand_entity.npy", np.concatenate(NAMES).astype(np.int32))
    candidates = pa.table({"entity": pa.array(ENTITIES, pa.int32())})
    pq.write_table(candidates, tmp_path / "candidates/entities.parquet")
    x = np.hstack([rng.normal(size=(40, 3)), np.ones((40, 1))])
    np.save(tmp_path / "moments/moments.npy", x.T @ x)
    for block, size in enumerate((4, 2)):
        np.save(tmp_path / f"texts/{block:05d}.npy", np.zeros((size, 3), np.float16))
        vectors = rng.normal(size=(size, 3)).astype(np.float32)
        np.save(tmp_path / f"prototypes/{block:05d}.npy", vectors)
        measures = rng.uniform(1, 9, (4, size))
        np.save(tmp_path / f"prototypes/{block:05d}-measures.npy", measures)
    return tmp_path


def _ancestors(name):
    found, level = {name: 0}, {name}
    for steps in (1, 2, 3):
        level = {parent for one in level for parent in BASE[one]} - {*found}
        found |= dict.fromkeys(level, steps)
    return found


def test_kinship_is_that_to_candidates_below_the_same_classes(workdir, monkeypatch):
    monkeypatch.setattr(z_scores, "CHUNK", 3)
    names = [[*BASE][entity] for entity in ENTITIES]
    blocks = [workdir / f"prototypes/{block:05d}" for block in (0, 1)]
    vectors = np.concatenate([np.load(f"{block}.npy") for block in blocks])
    support = np.concatenate([np.load(f"{block}-measures.npy")[0] for block in blocks])
    _, covariance = z_scores.mean_and_covariance(workdir / "moments/moments.npy")
    expected = []
    for one, name in enumerate(names):
        direction, pictures = np.zeros(3), 0
        for ancestor, steps in _ancestors(name).items():
            below = [i for i, other in enumerate(names) if ancestor in _ancestors(other)]
            size = sum(support[i] for i in below)
            for i in below if steps and len(below) > 1 else ():
                if i != one and {names[i], name} != {"crane", "crane2"}:
                    direction += 0.5**steps / (size + 1) * vectors[i]
                    pictures += support[i]
        spread = direction @ covariance @ direction
        along = direction @ z_scores.ridged(covariance) @ vectors[one] / support[one]
        shrunk = pictures / (pictures + 5)
        expected.append(max(along / np.sqrt(spread) * shrunk, 0) if pictures else 0)
    files = senses.run(engine.Engine(workdir))
    found = pa.concat_tables([pq.read_table(path) for path in files])
    assert found["entity"].to_pylist() == ENTITIES
    np.testing.assert_allclose(found["kin"].to_numpy(), expected, atol=2e-4)
    assert sum(value > 0 for value in expected) > 2
    assert expected[names.index("mood")] == 0


def test_probabilities_are_shares_of_what_was_mixed(tmp_path):
    """Of pictures drawn as the model supposes, those of probability p show it p of the time."""
    rng = np.random.default_rng(0)
    entities, each = 300, 200
    distance = rng.choice([1.0, 2.0, 3.0], entities)
    visible = np.where(rng.random(entities) < 0.5, 0.6, 0.01)
    shows = rng.random((entities, each)) < visible[:, None]
    z_score = rng.normal(size=shows.shape) + shows * distance[:, None]
    bins = np.floor((z_score + 6) * 4).astype(int)
    entity = np.repeat(np.arange(entities), each)
    codes, counts = np.unique(entity * 64 + bins.ravel(), return_counts=True)
    sums = {"entity": (codes // 64).astype(np.int32), "bin": (codes % 64).astype(np.int8)}
    pq.write_table(pa.table(sums | {"weight": counts * 10**6}), tmp_path / "sums.parquet")
    kin = {"entity": np.arange(entities, dtype=np.int32), "kin": np.zeros(entities, np.float32)}
    pq.write_table(pa.table(kin), tmp_path / "kin.parquet")
    task = engine.Task("entities", (tmp_path / "kin.parquet", tmp_path / "sums.parquet"))
    engine.Engine(tmp_path).map_shards("visibility", visibility._fit, [task], {}, keys=None)
    table = pq.read_table(tmp_path / "visibility/entities.parquet")
    assert np.mean((table["visible"].to_numpy() > 0.5) == (visible == 0.6)) > 0.97
    mixture = np.array(table["mixture"].to_pylist())
    found, fit = visibility.shown(entity, z_score.ravel(), np.arange(entities), mixture)
    for low, high in ((0.05, 0.3), (0.3, 0.6), (0.6, 0.9), (0.9, 1)):
        some = (found >= low) & (found < high)
        assert shows.ravel()[some].mean() == pytest.approx(found[some].mean(), abs=0.03)
    assert fit[found > 0.9].min() > 1 > fit[(found < 0.2) & (visible[entity] == 0.6)].min()

"""Selection in a world of colours with known answers."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import engine
from data_prep.engine import executors, relational
from data_prep.selection import choose, embed
from mofi_jax.common import errors
from tests import decision, label_tables, workdirs


@pytest.fixture
def world(tmp_path, monkeypatch):
    workdir, pairs = workdirs.write(tmp_path)
    model = workdirs.Model()
    monkeypatch.setattr(embed, "load_model", lambda folder, batch_size: model)
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "model.json").write_text("{}")
    return workdir, {pair.key: pair for pair in pairs}, model, str(clip)


def _labels(workdir):
    paths = sorted((workdir / "labels").glob("*.parquet"))
    return {row["key"]: row for path in paths for row in pq.read_table(path).to_pylist()}


def test_clip_labels_are_the_colours_that_pictures_show(world):
    workdir, pairs, model, clip = world
    manifests = choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    labels = _labels(workdir)
    assert list(labels) == [
        key
        for path in sorted((workdir / "links").glob("*.parquet"))
        for key in pq.read_table(path)["key"].to_pylist()
    ]
    named_right = [pair for pair in pairs.values() if pair.named == pair.colour]
    for pair in named_right:
        assert labels[pair.key]["entities"] == [pair.colour], pair
        assert labels[pair.key]["reason"] is None
    for pair in pairs.values():
        row = labels[pair.key]
        if pair.named is None:
            assert row["reason"] == "no_mention"
        elif pair.named != pair.colour:
            assert pair.named not in row["entities"], pair
        assert (row["reason"] is None) == bool(row["entities"])
        assert len(row["entities"]) == len(row["scores"]) == len(row["z_scores"])
    counts = engine.total_counts(manifests)
    assert counts["pairs"] == len(pairs) == model.pictures + counts["no_mention"]
    rejects = [
        tuple(row.values())
        for path in sorted((workdir / "rejects").glob("labels-*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    assert sorted(rejects) == sorted(
        (key, "labels", row["reason"]) for key, row in labels.items() if row["reason"]
    )


def test_text_labels_are_the_likeliest_senses_and_need_no_model(world):
    workdir, pairs, model, _ = world
    choose.run(workdirs.config(labels="text"), engine.Engine(workdir))
    for key, row in _labels(workdir).items():
        named = pairs[key].named
        if named is None:
            assert (row["entities"], row["reason"]) == ([], "no_mention")
        else:
            first = workdirs.RED_STATE if named == 0 else named
            assert row["entities"] == [first, workdirs.BACKGROUND]
    assert model.pictures == 0


def test_new_thresholds_touch_neither_model_nor_pictures(world, tmp_path):
    workdir, _pairs, model, clip = world
    choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    for tar in (tmp_path / "tars").iterdir():
        tar.unlink()
    seen, labelled = model.pictures, sum(bool(r["entities"]) for r in _labels(workdir).values())
    choose.run(workdirs.config(clip=clip, min_z_score=1.8), engine.Engine(workdir))
    assert model.pictures == seen
    assert sum(bool(r["entities"]) for r in _labels(workdir).values()) < labelled
    choose.run(workdirs.config(clip=clip, min_score=1.1), engine.Engine(workdir))
    reasons = {row["reason"] for row in _labels(workdir).values()}
    assert reasons == {"below_min_score", "no_mention"}
    assert model.pictures == seen


def test_another_model_is_noticed(world):
    workdir, _pairs, model, clip = world
    choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    with open(f"{clip}/model.json", "w") as file:
        file.write('{"other": 1}')
    seen = model.pictures
    choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    assert model.pictures == 2 * seen


class ModelHere(executors.Local):
    """The stand-in for a model is known to this process alone."""

    def run(self, todo, accelerator):
        return executors.Local().run(todo, True) if accelerator else super().run(todo, False)


def test_output_is_the_same_for_one_and_two_workers(world, tmp_path):
    workdir, _, _, clip = world
    digests = []
    for workers in (1, 2):
        with engine.Engine(workdir, executor=ModelHere(workers)) as work:
            choose.run(workdirs.config(clip=clip), work)
        stages = ("texts", "embeddings", "moments", "prototypes", "z_scores", "coherence")
        stages = (*stages, "labels")
        files = [path for stage in stages for path in sorted((workdir / stage).glob("[!.]*"))]
        files += sorted((workdir / "rejects").glob("labels-*"))
        digests.append({str(path.relative_to(workdir)): engine.sha256(path) for path in files})
        for path in files:
            path.unlink()
    assert len(digests[0]) > 20
    assert digests[0] == digests[1]


def test_saved_evidence_matches_plain_numpy(world):
    workdir, _pairs, _model, clip = world
    choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    shards = sorted((workdir / "z_scores").glob("*.parquet"))
    rows = [row for path in shards for row in pq.read_table(path).to_pylist()]
    x = np.concatenate([np.load(workdir / f"embeddings/{p.stem}.npy") for p in shards])
    x = x.astype(np.float64)
    entities = pq.read_table(workdir / "candidates/entities.parquet")["entity"].to_pylist()
    texts = np.load(workdir / "texts/00000.npy").astype(np.float64)
    prior = {}
    for path in shards:
        for link in pq.read_table(workdir / "links" / path.name).to_pylist():
            for c in link["candidates"]:
                prior[link["key"], c["entity"]] = c["prior"]
    products = x @ texts.T  # every picture with every entity: what the stage never computes
    names = ("entities", "scores", "text_z_scores", "picture_z_scores")
    for i, row in enumerate(rows):
        for entity, score, text_z_score, picture_z_score in zip(
            *(row[n] for n in names), strict=True
        ):
            column = products[:, entities.index(entity)]
            assert score == pytest.approx(column[i], abs=1e-3)
            assert text_z_score == pytest.approx(
                (column[i] - column.mean()) / column.std(), abs=2e-3
            )
            others = [j for j in range(len(rows)) if j != i and (rows[j]["key"], entity) in prior]
            weights = np.array([prior[rows[j]["key"], entity] for j in others])
            prototype = weights @ (x[others] - x.mean(0))
            along = x @ prototype
            expected = (along[i] - along.mean()) / along.std() * weights.sum() / (weights.sum() + 1)
            assert picture_z_score == pytest.approx(expected, abs=2e-3)


def test_blocks_and_runs_change_nothing(world, monkeypatch):
    workdir, _, _, clip = world
    found = []
    for size, files in ((1 << 16, 4), (2, 1)):
        monkeypatch.setattr(embed, "_TEXTS", size)
        monkeypatch.setattr(embed, "_BUCKETS", 16)  # some without a text
        monkeypatch.setattr(relational, "_FILES_PER_RUN", files)
        choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
        found.append([label_tables.read(workdir, "z_scores/*.parquet")])
        found[-1].append(label_tables.read(workdir, "coherence/*.parquet"))
    assert len(list((workdir / "texts").glob("*.npy"))) == 16
    assert len(list((workdir / "moment_parts").glob("*.npy"))) == 3
    assert found[0] == found[1]


def test_a_new_template_or_batch_size_embeds_no_picture_again(world):
    workdir, _, model, clip = world
    choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    seen, before = model.pictures, label_tables.read(workdir, "z_scores/*.parquet")
    choose.run(workdirs.config(clip=clip, template="{name}"), engine.Engine(workdir))
    assert label_tables.read(workdir, "z_scores/*.parquet") != before
    texts = os.stat(workdir / "texts/00000.npy").st_mtime_ns
    choose.run(workdirs.config(clip=clip, template="{name}", batch_size=3), engine.Engine(workdir))
    assert (model.pictures, os.stat(workdir / "texts/00000.npy").st_mtime_ns) == (seen, texts)


def test_labels_are_those_of_choose(world):
    """Every label, number and reason as the decision on one picture at a time gives them."""
    workdir, _, _, clip = world
    config = workdirs.config(clip=clip, min_score=0.6)
    choose.run(config, engine.Engine(workdir))
    rows = pq.read_table(workdir / "coherence/entities.parquet").to_pylist()
    coherence = {row["entity"]: row["coherence"] for row in rows}
    labels, reasons = _labels(workdir), set()
    for path in sorted((workdir / "links").glob("*.parquet")):
        known = {}
        for row in pq.read_table(workdir / "z_scores" / path.name).to_pylist():
            values = (row["scores"], row["text_z_scores"], row["picture_z_scores"])
            known[row["key"]] = {
                entity: (*numbers, coherence[entity])
                for entity, *numbers in zip(row["entities"], *values, strict=True)
            }
        for link in pq.read_table(path).to_pylist():
            own = known.get(link["key"], {})
            candidates = [(c["mention"], c["entity"], c["prior"]) for c in link["candidates"]]
            entities, reason = decision.choose(candidates, own, config)
            row = labels[link["key"]]
            assert row["entities"] == entities
            assert row["scores"] == [own[entity][0] for entity in entities]
            z_scores = decision.z_scores(own, config)
            assert row["z_scores"] == pytest.approx([z_scores[e] for e in entities], abs=1e-6)
            assert row["reason"] == (reason if link["mentions"] else "no_mention")
            reasons.add(row["reason"])
    assert reasons == {None, "no_mention", "below_min_score", "below_min_z_score"}


def test_coherence_tells_what_pictures_show(world):
    workdir, _, _, clip = world
    choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    rows = pq.read_table(workdir / "coherence/entities.parquet").to_pylist()
    coherence = {row["entity"]: row["coherence"] for row in rows}
    assert all(coherence[colour] > coherence[workdirs.BACKGROUND] + 0.3 for colour in range(4))


@pytest.mark.parametrize("empty", [1, 3])
def test_shards_without_candidates(world, empty):
    workdir, _, model, clip = world
    for path in sorted((workdir / "links").glob("*.parquet"))[:empty]:
        table = pq.read_table(path)
        for name in ("mentions", "candidates"):
            nothing = pa.array([[]] * len(table), table.schema.field(name).type)
            table = table.set_column(table.schema.get_field_index(name), name, nothing)
        pq.write_table(table, path)
    choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    labels = _labels(workdir)
    assert len(labels) == 60
    assert any(row["entities"] for row in labels.values()) == (empty < 3)
    assert (model.pictures == 0) == (empty == 3)


def test_pictures_that_are_all_gone_are_rejects(world, tmp_path):
    workdir, pairs, _, clip = world
    for path in (tmp_path / "tars").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    for key, row in _labels(workdir).items():
        assert row["reason"] == ("no_mention" if pairs[key].named is None else "picture_unreadable")


def test_a_model_that_diverged_is_told_before_any_picture_is_embedded(world):
    workdir, _, model, clip = world
    model.params["offset"] = np.array([1.0, np.nan], np.float32)
    with pytest.raises(errors.BadInput, match="1 of its 1 arrays of weights hold NaN"):
        # Not even where a shard may fail.
        choose.run(workdirs.config(clip=clip), engine.Engine(workdir, failure_budget=0.5))
    assert not model.pictures
    assert not (workdir / "embeddings").exists()


def test_a_picture_whose_embedding_overflows_costs_itself(world, monkeypatch):
    workdir, _, model, clip = world
    embed_images, seen = model._embed_images, []

    def overflow(params, images):
        found = embed_images(params, images)
        if not seen:
            found[0] = np.inf
        seen.append(len(images))
        return found

    monkeypatch.setattr(model, "_embed_images", overflow)
    choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    reasons = [row["reason"] for row in _labels(workdir).values()]
    assert reasons.count("picture_unreadable") == 1


def test_bad_configurations(world):
    workdir, _, _, _ = world
    with pytest.raises(errors.BadInput, match=r"config\.clip is not set"):
        choose.run(workdirs.config(), engine.Engine(workdir))
    with pytest.raises(errors.BadInput, match="no folder"):
        choose.run(workdirs.config(clip="/nowhere/at/all"), engine.Engine(workdir))

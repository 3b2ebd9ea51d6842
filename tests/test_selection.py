"""Selection in a world of colours with known answers."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import engine
from data_prep.engine import executors, relational
from data_prep.selection import choose, embed, visibility, z_scores
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
    choose.run(workdirs.config(clip=clip, min_probability=0.8), engine.Engine(workdir))
    assert model.pictures == seen
    assert 0 < sum(bool(r["entities"]) for r in _labels(workdir).values()) < labelled
    choose.run(workdirs.config(clip=clip, min_probability=0.99), engine.Engine(workdir))
    reasons = {row["reason"] for row in _labels(workdir).values()}
    assert reasons == {"below_min_probability", "no_mention"}
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
            choose.run(workdirs.config(clip=clip, target_precision=0.5), work)
        stages = ("texts", "embeddings", "moments", "prototypes", "z_scores", "classes", "kin")
        stages = (*stages, "visibility", "precision_parts", "labels")
        files = [path for stage in stages for path in sorted((workdir / stage).glob("[!.]*"))]
        files += sorted((workdir / "rejects").glob("labels-*"))
        digests.append({str(path.relative_to(workdir)): engine.sha256(path) for path in files})
        for path in files:
            path.unlink()
    assert len(digests[0]) > 20
    assert digests[0] == digests[1]


def test_saved_evidence_matches_plain_numpy(world):
    workdir, _pairs, _model, clip = world
    config = workdirs.config(clip=clip)
    choose.run(config, engine.Engine(workdir))
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
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    ridged = covariance + z_scores.RIDGE * np.trace(covariance) / len(covariance) * np.eye(
        x.shape[1]
    )
    for i, row in enumerate(rows):
        for entity, score, z_score in zip(
            *(row[n] for n in ("entities", "scores", "z_scores")), strict=True
        ):
            text = texts[entities.index(entity)]
            assert score == pytest.approx(x[i] @ text, abs=1e-3)
            others = [j for j in range(len(rows)) if j != i and (rows[j]["key"], entity) in prior]
            weights = np.array([prior[rows[j]["key"], entity] for j in others])
            n = weights.sum()
            # Every picture with every entity: what the stage never computes.
            pictures = centred @ np.linalg.solve(ridged, weights @ centred[others])
            both = centred @ text / (centred @ text).std()
            both = both + config.prototype_weight * n / (n + 1) * pictures / pictures.std()
            assert z_score == pytest.approx(both[i] / both.std(), abs=5e-3)


def test_blocks_and_runs_change_nothing(world, monkeypatch):
    workdir, _, _, clip = world
    found = []
    for size, files in ((1 << 16, 4), (2, 1)):
        monkeypatch.setattr(embed, "_TEXTS", size)
        monkeypatch.setattr(embed, "_BUCKETS", 16)  # some without a text
        monkeypatch.setattr(relational, "_FILES_PER_RUN", files)
        choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
        found.append([label_tables.read(workdir, "z_scores/*.parquet")])
        found[-1].append(label_tables.read(workdir, "visibility/*.parquet"))
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
    config = workdirs.config(clip=clip, min_probability=0.6, never_labels=("Q98",))
    choose.run(config, engine.Engine(workdir))
    mixtures = label_tables.read(workdir, "visibility/*.parquet")
    distances = np.array(visibility._DISTANCES)
    labels, reasons = _labels(workdir), set()
    for path in sorted((workdir / "links").glob("*.parquet")):
        scored = {
            row["key"]: row for row in pq.read_table(workdir / "z_scores" / path.name).to_pylist()
        }
        for link in pq.read_table(path).to_pylist():
            numbers, known = {}, {}
            row = scored.get(link["key"], {"entities": [], "scores": [], "z_scores": []})
            for entity, score, z_score in zip(
                *(row[n] for n in ("entities", "scores", "z_scores")), strict=True
            ):
                [of] = [of for of in mixtures if of["entity"] == entity]
                ratio = np.exp(z_score * distances - distances**2 / 2)
                shown, others = 0, 0
                for v, weights in zip((0.01, 0.6), np.reshape(of["mixture"], (2, -1)), strict=True):
                    shown += weights @ (v * ratio / (v * ratio + 1 - v))
                    others += weights @ (1 / (v * ratio + 1 - v))
                numbers[entity] = (score, z_score)
                known[entity] = (of["kin"], 0 if entity == 2 else shown, 1 / others)
            candidates = [(c["mention"], c["entity"], c["prior"]) for c in link["candidates"]]
            chosen, reason = decision.choose(candidates, known, config)
            row = labels[link["key"]]
            assert row["entities"] == [entity for entity, _ in chosen]
            assert row["scores"] == [numbers[entity][0] for entity, _ in chosen]
            assert row["z_scores"] == [numbers[entity][1] for entity, _ in chosen]
            assert row["probabilities"] == pytest.approx([p for _, p in chosen], abs=2e-4)
            assert row["reason"] == (reason if link["mentions"] else "no_mention")
            reasons.add(row["reason"])
    assert reasons == {None, "no_mention", "below_min_probability"}


def test_the_mixtures_tell_what_pictures_show(world):
    workdir, _, _, clip = world
    choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    rows = label_tables.read(workdir, "visibility/*.parquet")
    visible = {row["entity"]: row["visible"] for row in rows}
    assert all(visible[colour] > 0.9 for colour in range(4))
    assert visible[workdirs.BACKGROUND] < 0.1


def test_a_target_precision_is_a_higher_threshold(world):
    workdir, _, _, clip = world
    chosen = []
    for target in (None, 0.7, 0.85):
        config = workdirs.config(clip=clip, min_probability=0.1, target_precision=target)
        choose.run(config, engine.Engine(workdir))
        found = [p for row in _labels(workdir).values() for p in row["probabilities"]]
        assert not target or np.mean(found) >= target
        assert min(found) >= choose.rule_in_force(workdir).min_probability
        chosen.append(len(found))
    assert chosen[0] > chosen[1] > chosen[2] > 0


def test_kinds_that_no_picture_shows_are_no_labels_unless_pictured(world, caplog):
    workdir, _, _, clip = world
    table = pq.read_table(workdir / "kb/entities.parquet")
    columns = {
        "kind": ["time", "time", "event", None, "event", "event"],
        "image": [None, "x.jpg", None, None, None, None],
    }
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(values, pa.string()))
    pq.write_table(table, workdir / "kb/entities.parquet")
    changes = {"label_kinds": ("event",), "never_labels": ("Q3", "Q404", 7)}
    for labels in ("clip", "text"):  # neither red nor gold, to which Q3 leads
        choose.run(workdirs.config(clip=clip, labels=labels, **changes), engine.Engine(workdir))
        rows = _labels(workdir)
        entities = {entity for row in rows.values() for entity in row["entities"]}
        assert {1, 2} <= entities <= {1, 2, workdirs.RED_STATE, workdirs.BACKGROUND}
    choose.run(
        workdirs.config(clip=clip, label_kinds=(), never_labels=("q97",)), engine.Engine(workdir)
    )
    reasons = {row["reason"] for row in _labels(workdir).values()}
    assert reasons >= {None, "barred"}
    told = [record.getMessage() for record in caplog.records if "never_labels" in record.msg]
    assert len(told) == 2  # a run
    assert "2 of 3 ids, such as 'Q404', are not in the knowledge base: see" in told[0]
    config = workdirs.config(labels="text", never_labels=("Q404",))  # of a larger base's, perhaps
    choose.run(config, engine.Engine(workdir))
    assert "1 of 1 ids, such as 'Q404', are not in the knowledge base" in caplog.text


def test_pictures_that_look_the_same_count_once(world):
    """Of the greens all are one picture: it speaks for its entity once, however it is spread."""
    workdir, pairs, _, clip = world
    green = {key for key, pair in pairs.items() if pair.colour == 1}
    for path in sorted((workdir / "pairs").glob("*.parquet")):
        table = pq.read_table(path)
        rows = [
            row | {"phash": 0 if row["key"] in green else int(row["key"]) + 1}
            for row in table.to_pylist()
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
    support = {
        row["entity"]: row["support"] for row in label_tables.read(workdir, "visibility/*.parquet")
    }
    named = [pair for pair in pairs.values() if pair.named is not None]
    once = {pair.named for pair in named if pair.colour == 1}
    for entity in (1, 2, 3):
        others = sum(pair.named == entity and pair.colour != 1 for pair in named)
        assert support[entity] == pytest.approx(others + (entity in once), abs=1e-3)
    others = sum(pair.colour != 1 for pair in named)
    assert support[workdirs.BACKGROUND] == pytest.approx(others + 1, abs=1e-3)


def test_a_placeholder_on_two_hundred_pages_is_one_picture(world):
    workdir, _, _, clip = world
    stages = ("z_scores", "visibility", "labels")

    def found():
        choose.run(workdirs.config(clip=clip), engine.Engine(workdir))
        tables = {stage: label_tables.read(workdir, f"{stage}/*.parquet") for stage in stages}
        return tables | {"pictures": np.load(workdir / "moments/moments.npy")[-1, -1]}

    before = found()
    assert before["pictures"] == 55
    name = "colours-00001-00000.parquet"
    for stage in ("pairs", "links"):
        rows = pq.read_table(workdir / stage / name)
        copies = [rows.slice(0, 1).to_pylist()[0] | {"key": f"9{i:03d}"} for i in range(200)]
        copies = pa.Table.from_pylist(copies, schema=rows.schema)
        pq.write_table(pa.concat_tables([rows, copies]), workdir / stage / name)
    after = found()
    original = pq.read_table(workdir / "links" / name)["key"][0].as_py()
    for stage in stages:
        rows = [row for row in after[stage] if row.get("key", "")[:1] != "9"]
        assert rows == before[stage]
    # They are judged beside what is left: as the one is.
    of = {row.pop("key"): row for row in after["z_scores"]}
    assert sum(row == of[original] for row in of.values()) == 201
    assert after["pictures"] == 55


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
    with pytest.raises(
        errors.BadInput, match=r"target_precision=1\.5 cannot be used: give a number"
    ):
        choose.check(workdirs.config(target_precision=1.5))
    for name, value in (
        ("kin_weight", np.inf),
        ("prior_weight", -1.0),
        ("prototype_weight", np.nan),
    ):
        with pytest.raises(errors.BadInput, match=rf"{name}={value} cannot be used: give 0, which"):
            choose.check(workdirs.config(**{name: value}))
    with pytest.raises(
        errors.BadInput, match=r"target_precision=0\.8 .*: what is right the picture"
    ):
        choose.check(workdirs.config(target_precision=0.8, labels="text"))
    with pytest.raises(errors.BadInput, match=r"label_kinds has 'mood': choose among person, "):
        choose.check(workdirs.config(label_kinds=("mood",)))

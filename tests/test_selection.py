"""Selection in a world of colours with known answers, and its parts against plain numpy."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import candidates, engine, evidence, fits, selection
from mofi_jax.common import errors
from tests import workdirs


@pytest.fixture
def world(tmp_path, monkeypatch):
    workdir, pairs = workdirs.write(tmp_path)
    model = workdirs.Model()
    monkeypatch.setattr(evidence, "load_model", lambda folder, batch_size: model)
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "model.json").write_text("{}")
    return workdir, {pair.key: pair for pair in pairs}, model, str(clip)


def _labels(workdir):
    paths = sorted((workdir / "labels").glob("*.parquet"))
    return {row["key"]: row for path in paths for row in pq.read_table(path).to_pylist()}


def test_clip_labels_are_the_colours_that_pictures_show(world):
    workdir, pairs, model, clip = world
    manifests = selection.run(workdirs.config(clip=clip), engine.Engine(workdir))
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
        assert len(row["entities"]) == len(row["scores"]) == len(row["fits"])
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
    selection.run(workdirs.config(labels="text"), engine.Engine(workdir))
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
    selection.run(workdirs.config(clip=clip), engine.Engine(workdir))
    for tar in (tmp_path / "tars").iterdir():
        tar.unlink()
    seen, labelled = model.pictures, sum(bool(r["entities"]) for r in _labels(workdir).values())
    selection.run(workdirs.config(clip=clip, min_fit=1.8), engine.Engine(workdir))
    assert model.pictures == seen
    assert sum(bool(r["entities"]) for r in _labels(workdir).values()) < labelled
    selection.run(workdirs.config(clip=clip, min_score=1.1), engine.Engine(workdir))
    reasons = {row["reason"] for row in _labels(workdir).values()}
    assert reasons == {"below_min_score", "no_mention"}
    assert model.pictures == seen


def test_another_model_is_noticed(world):
    workdir, _pairs, model, clip = world
    selection.run(workdirs.config(clip=clip), engine.Engine(workdir))
    with open(f"{clip}/model.json", "w") as file:
        file.write('{"other": 1}')
    seen = model.pictures
    selection.run(workdirs.config(clip=clip), engine.Engine(workdir))
    assert model.pictures == 2 * seen


def test_output_is_the_same_for_one_and_two_workers(world, tmp_path):
    workdir, _, _, clip = world
    digests = []
    for workers in (1, 2):
        selection.run(workdirs.config(clip=clip), engine.Engine(workdir, workers))
        stages = ("texts", "scores", "background", "fits", "coherence", "labels")
        files = [path for stage in stages for path in sorted((workdir / stage).glob("[!.]*"))]
        files += sorted((workdir / "rejects").glob("labels-*"))
        digests.append({str(path.relative_to(workdir)): engine.sha256(path) for path in files})
        for path in files:
            path.unlink()
    assert len(digests[0]) > 20
    assert digests[0] == digests[1]


def test_saved_evidence_matches_plain_numpy(world):
    workdir, _pairs, _model, clip = world
    selection.run(workdirs.config(clip=clip), engine.Engine(workdir))
    shards = sorted((workdir / "scores").glob("*.parquet"))
    rows = [row for path in shards for row in pq.read_table(path).to_pylist()]
    fits = [r for path in shards for r in pq.read_table(workdir / "fits" / path.name).to_pylist()]
    x = np.concatenate([np.load(p.with_suffix(".npy")) for p in shards]).astype(np.float64)
    entities = np.load(workdir / "texts/entities.npy").tolist()
    texts = np.load(workdir / "texts/embeddings.npy").astype(np.float64)
    prior = {}
    for path in shards:
        for link in pq.read_table(workdir / "links" / path.name).to_pylist():
            for c in link["candidates"]:
                prior[link["key"], c["entity"]] = c["prior"]
    products = x @ texts.T  # every picture with every entity: what the stage never computes
    for i, (row, fit) in enumerate(zip(rows, fits, strict=True)):
        assert row["key"] == fit["key"]
        for entity, score, text_fit, picture_fit in zip(
            row["entities"], row["scores"], fit["text_fits"], fit["picture_fits"], strict=True
        ):
            column = products[:, entities.index(entity)]
            assert score == pytest.approx(column[i], abs=1e-3)
            assert text_fit == pytest.approx((column[i] - column.mean()) / column.std(), abs=2e-3)
            others = [j for j in range(len(rows)) if j != i and (rows[j]["key"], entity) in prior]
            weights = np.array([prior[rows[j]["key"], entity] for j in others])
            prototype = weights @ (x[others] - x.mean(0))
            along = x @ prototype
            expected = (along[i] - along.mean()) / along.std() * weights.sum() / (weights.sum() + 1)
            assert picture_fit == pytest.approx(expected, abs=2e-3)


def test_labels_are_those_of_choose(world):
    """Every label, score, fit and reason as the decision on one picture at a time gives them."""
    workdir, _, _, clip = world
    config = workdirs.config(clip=clip, min_score=0.6)
    selection.run(config, engine.Engine(workdir))
    rule = selection.Rule.of(config)
    rows = pq.read_table(workdir / "coherence/entities.parquet").to_pylist()
    coherence = {row["entity"]: row["coherence"] for row in rows}
    labels, reasons = _labels(workdir), set()
    for path in sorted((workdir / "links").glob("*.parquet")):
        known = {}
        scores, fits_of = (
            pq.read_table(workdir / stage / path.name).to_pylist() for stage in ("scores", "fits")
        )
        for score, fit in zip(scores, fits_of, strict=True):
            values = (score["scores"], fit["text_fits"], fit["picture_fits"])
            known[score["key"]] = {
                entity: selection.Evidence(*numbers, coherence[entity])
                for entity, *numbers in zip(score["entities"], *values, strict=True)
            }
        for link in pq.read_table(path).to_pylist():
            own = known.get(link["key"], {})
            entities, reason = selection.choose(link["candidates"], own, rule)
            row = labels[link["key"]]
            assert row["entities"] == entities
            assert row["scores"] == [own[entity].score for entity in entities]
            assert row["fits"] == pytest.approx([own[e].fit(rule) for e in entities], abs=1e-6)
            assert row["reason"] == (reason if link["mentions"] else "no_mention")
            reasons.add(row["reason"])
    assert reasons == {None, "no_mention", "below_min_score", "below_min_fit"}


def test_coherence_tells_what_pictures_show(world):
    workdir, _, _, clip = world
    selection.run(workdirs.config(clip=clip), engine.Engine(workdir))
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
    selection.run(workdirs.config(clip=clip), engine.Engine(workdir))
    labels = _labels(workdir)
    assert len(labels) == 60
    assert any(row["entities"] for row in labels.values()) == (empty < 3)
    assert (model.pictures == 0) == (empty == 3)


def test_bad_configurations(world):
    workdir, _, _, _ = world
    with pytest.raises(errors.BadInput, match=r"config\.clip is not set"):
        selection.run(workdirs.config(), engine.Engine(workdir))
    with pytest.raises(errors.BadInput, match="no folder"):
        selection.run(workdirs.config(clip="/nowhere/at/all"), engine.Engine(workdir))
    with pytest.raises(errors.BadInput, match=r"config\.labels='image'.*clip or text"):
        selection.run(workdirs.config(labels="image"), engine.Engine(workdir))


# ---------------------------------------------------------------------------------- the decision

_RULE = selection.Rule(
    prototype_weight=1.0,
    coherence_weight=1.0,
    prior_weight=1.0,
    min_fit=0.0,
    min_score=0.1,
    max_gap=0.5,
    max_labels=2,
)


def _evidence(fit, score=0.5):
    return selection.Evidence(score=score, text_fit=fit, picture_fit=fit, coherence=0.0)


def _candidate(mention, entity, prior=1.0):
    return {"mention": mention, "entity": entity, "prior": prior}


def test_choice_between_senses_weighs_the_prior_and_between_mentions_does_not():
    own = [_candidate(0, 1, 0.9), _candidate(0, 2, 0.1), _candidate(1, 3, 0.2)]
    # Two standard deviations do not outweigh log 9; three do.
    known = {1: _evidence(1.0), 2: _evidence(3.0), 3: _evidence(1.2)}
    assert selection.choose(own, known, _RULE) == ([3, 1], None)
    known[2] = _evidence(4.0)
    assert selection.choose(own, known, _RULE) == ([2], None)


def test_choice_limits():
    own = [_candidate(i, i) for i in range(4)]
    known = {0: _evidence(2.0), 1: _evidence(1.8), 2: _evidence(1.6), 3: _evidence(0.4)}
    assert selection.choose(own, known, _RULE)[0] == [0, 1]
    assert selection.choose(own, known, _RULE._replace(max_labels=9))[0] == [0, 1, 2]
    assert selection.choose(own, known, _RULE._replace(max_gap=0.0))[0] == [0]
    high = _RULE._replace(min_fit=2.1)
    assert selection.choose(own, known, high) == ([], "below_min_fit")
    unlike = {entity: _evidence(3.0, score=0.05) for entity in range(4)}
    assert selection.choose(own, unlike, _RULE) == ([], "below_min_score")
    assert selection.choose([], {}, _RULE) == ([], "no_candidate")


def test_equal_senses_are_decided_by_prior_and_then_by_row():
    known = {5: _evidence(1.0), 6: _evidence(1.0)}
    likely = [_candidate(0, 5, 0.4), _candidate(0, 6, 0.6)]
    assert selection.choose(likely, known, _RULE)[0] == [6]
    equal = [_candidate(0, 6, 0.5), _candidate(0, 5, 0.5)]
    assert selection.choose(equal, known, _RULE)[0] == [5]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 6),
            st.floats(0.01, 1.0),
            st.floats(-3, 3),
            st.floats(-1, 1),
        ),
        max_size=12,
    ),
    st.randoms(),
)
def test_choice_keeps_its_promises(rows, random):
    own = [_candidate(mention, entity, prior) for mention, entity, prior, _, _ in rows]
    known = {entity: _evidence(fit, score) for _, entity, _, fit, score in rows}
    entities, reason = selection.choose(own, known, _RULE)
    assert (reason is None) == bool(entities)
    assert len(entities) == len(set(entities)) <= _RULE.max_labels
    fits = [known[entity].fit(_RULE) for entity in entities]
    assert fits == sorted(fits, reverse=True)
    assert all(fit >= max(_RULE.min_fit, fits[0] - _RULE.max_gap) for fit in fits)
    assert all(known[entity].score >= _RULE.min_score for entity in entities)
    random.shuffle(own)
    assert selection.choose(own, known, _RULE) == (entities, reason)


_CANDIDATES = st.tuples(
    st.integers(0, 3),  # mention
    st.integers(0, 6),  # entity
    st.sampled_from([0.01, 0.25, 0.5, 1.0]),  # prior, often equal
)
_KNOWN = st.tuples(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0, 1.25]), st.floats(-1, 1))


def _shard(rows):
    """`candidates.Candidates` of lists of (mention, entity, prior)."""
    flat = [(row, *candidate) for row, own in enumerate(rows) for candidate in own]
    row, mention, entity, prior = np.array(flat, np.float64).reshape(-1, 4).T
    return candidates.Candidates(
        pa.array([str(row) for row in range(len(rows))]),
        np.full(len(rows), 4),
        row.astype(np.int64),
        mention.astype(np.int32),
        entity.astype(np.int32),
        prior.astype(np.float32),
    )


def _by_row(chosen, rows):
    return [chosen.entity[chosen.row == row].tolist() for row in range(rows)]


@given(
    st.lists(
        st.tuples(st.lists(_CANDIDATES, max_size=8), st.lists(_KNOWN, min_size=7, max_size=7)),
        max_size=6,
    ),
    st.sampled_from([-0.75, 0.5]),
    st.sampled_from([0.0, 0.5]),
)
def test_a_shard_is_decided_as_its_pictures_are(pictures, min_fit, max_gap):
    rule = _RULE._replace(min_fit=min_fit, max_gap=max_gap)
    links = _shard([own for own, _ in pictures])
    fits_of, scores = np.array(
        [
            pictures[row][1][entity]
            for row, entity in zip(links.row, links.entity, strict=True)
        ]
    ).reshape(-1, 2).T  # fmt: skip
    evidence_of = selection.Evidence(scores, fits_of, fits_of, np.zeros(len(scores)))
    found = selection.choose_all(links, evidence_of, rule)
    expected, by_text = [], []
    for own, known in pictures:
        own = [_candidate(mention, entity, prior) for mention, entity, prior in own]
        known = {entity: _evidence(*numbers) for entity, numbers in enumerate(known)}
        expected.append(selection.choose(own, known, rule)[0])
        by_text.append(selection.best_prior_entities([{}] * 4, own))
    assert _by_row(found, len(pictures)) == expected
    likeliest = selection.best_priors(links)
    assert _by_row(likeliest, len(pictures)) == by_text
    for row, entity, prior in zip(likeliest.row, likeliest.entity, likeliest.score, strict=True):
        own = pictures[row][0]
        assert prior == np.float32(max(p for _, e, p in own if e == entity))


def test_unscored_pictures_get_nothing():
    links = _shard([[(0, 1, 1.0)], [(0, 1, 1.0), (0, 2, 0.5)]])
    unknown = np.array([np.nan, 0.5, np.nan])
    found = selection.choose_all(links, selection.Evidence(*[unknown] * 4), _RULE)
    assert _by_row(found, 2) == [[], [1]]


def test_best_prior_entities():
    mentions = [{}, {}, {}]
    own = [
        _candidate(0, 7, 0.2),
        _candidate(0, 8, 0.8),
        _candidate(2, 9, 0.5),
        _candidate(2, 4, 0.5),
    ]
    assert selection.best_prior_entities(mentions, own) == [8, 4]
    assert selection.best_prior_entities(mentions, []) == []
    twice = [_candidate(0, 3), _candidate(1, 3)]
    assert selection.best_prior_entities(mentions, twice) == [3]


def test_entity_text_without_description_is_the_name():
    template = "a photo of {name}, {description}"
    assert evidence.entity_text(template, "cat", "") == "cat"
    assert evidence.entity_text(template, "cat", "animal") == "a photo of cat, animal"


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-9, 9, width=32)), max_size=30))
def test_sums_by_column(pairs):
    columns = np.array([column for column, _ in pairs], np.int64)
    values = np.array([[value, 2 * value] for _, value in pairs], np.float32).reshape(-1, 2)
    expected = np.ones((6, 2))
    np.add.at(expected, columns, values)
    total = np.ones((6, 2))
    fits.add_by(total, columns, values.astype(np.float64))
    np.testing.assert_allclose(total, expected, atol=1e-9)


def test_deviations_are_z_scores_along_any_direction():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5))).astype(np.float32)
    centred = x - x.mean(0)
    direction = rng.normal(size=5).astype(np.float32)
    covariance = centred.T @ centred / len(x)
    directions = np.tile(direction * 1e-2, (200, 1))
    along = x @ direction
    np.testing.assert_allclose(
        fits.deviations(centred, directions, covariance),
        (along - along.mean()) / along.std(),
        atol=2e-3,
    )
    zero = fits.deviations(centred, np.zeros_like(directions), covariance)
    assert not zero.any()
    assert math.isfinite(zero.sum())

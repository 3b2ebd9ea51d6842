"""How entities are chosen from scores, by cases and against plain numpy."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from data_prep.linking import rows as link_rows
from data_prep.selection import choose, embed, z_scores

_RULE = choose.Rule(
    prototype_weight=1.0,
    coherence_weight=1.0,
    prior_weight=1.0,
    min_fit=0.0,
    min_score=0.1,
    max_gap=0.5,
    max_labels=2,
)


def _evidence(fit, score=0.5):
    return choose.Evidence(score=score, text_fit=fit, picture_fit=fit, coherence=0.0)


def _candidate(mention, entity, prior=1.0):
    return {"mention": mention, "entity": entity, "prior": prior}


def test_choice_between_senses_weighs_the_prior_and_between_mentions_does_not():
    own = [_candidate(0, 1, 0.9), _candidate(0, 2, 0.1), _candidate(1, 3, 0.2)]
    # Two standard deviations do not outweigh log 9; three do.
    known = {1: _evidence(1.0), 2: _evidence(3.0), 3: _evidence(1.2)}
    assert choose.choose(own, known, _RULE) == ([3, 1], None)
    known[2] = _evidence(4.0)
    assert choose.choose(own, known, _RULE) == ([2], None)


def test_choice_limits():
    own = [_candidate(i, i) for i in range(4)]
    known = {0: _evidence(2.0), 1: _evidence(1.8), 2: _evidence(1.6), 3: _evidence(0.4)}
    assert choose.choose(own, known, _RULE)[0] == [0, 1]
    assert choose.choose(own, known, _RULE._replace(max_labels=9))[0] == [0, 1, 2]
    assert choose.choose(own, known, _RULE._replace(max_gap=0.0))[0] == [0]
    high = _RULE._replace(min_fit=2.1)
    assert choose.choose(own, known, high) == ([], "below_min_fit")
    unlike = {entity: _evidence(3.0, score=0.05) for entity in range(4)}
    assert choose.choose(own, unlike, _RULE) == ([], "below_min_score")
    assert choose.choose([], {}, _RULE) == ([], "no_candidate")


def test_equal_senses_are_decided_by_prior_and_then_by_row():
    known = {5: _evidence(1.0), 6: _evidence(1.0)}
    likely = [_candidate(0, 5, 0.4), _candidate(0, 6, 0.6)]
    assert choose.choose(likely, known, _RULE)[0] == [6]
    equal = [_candidate(0, 6, 0.5), _candidate(0, 5, 0.5)]
    assert choose.choose(equal, known, _RULE)[0] == [5]


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
    entities, reason = choose.choose(own, known, _RULE)
    assert (reason is None) == bool(entities)
    assert len(entities) == len(set(entities)) <= _RULE.max_labels
    fits = [known[entity].fit(_RULE) for entity in entities]
    assert fits == sorted(fits, reverse=True)
    assert all(fit >= max(_RULE.min_fit, fits[0] - _RULE.max_gap) for fit in fits)
    assert all(known[entity].score >= _RULE.min_score for entity in entities)
    random.shuffle(own)
    assert choose.choose(own, known, _RULE) == (entities, reason)


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
    return link_rows.Candidates(
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
    evidence_of = choose.Evidence(scores, fits_of, fits_of, np.zeros(len(scores)))
    found = choose.choose_all(links, evidence_of, rule)
    expected, by_text = [], []
    for own, known in pictures:
        own = [_candidate(mention, entity, prior) for mention, entity, prior in own]
        known = {entity: _evidence(*numbers) for entity, numbers in enumerate(known)}
        expected.append(choose.choose(own, known, rule)[0])
        by_text.append(choose.best_prior_entities([{}] * 4, own))
    assert _by_row(found, len(pictures)) == expected
    likeliest = choose.best_priors(links)
    assert _by_row(likeliest, len(pictures)) == by_text
    for row, entity, prior in zip(likeliest.row, likeliest.entity, likeliest.score, strict=True):
        own = pictures[row][0]
        assert prior == np.float32(max(p for _, e, p in own if e == entity))


def test_unscored_pictures_get_nothing():
    links = _shard([[(0, 1, 1.0)], [(0, 1, 1.0), (0, 2, 0.5)]])
    unknown = np.array([np.nan, 0.5, np.nan])
    found = choose.choose_all(links, choose.Evidence(*[unknown] * 4), _RULE)
    assert _by_row(found, 2) == [[], [1]]


def test_best_prior_entities():
    mentions = [{}, {}, {}]
    own = [
        _candidate(0, 7, 0.2),
        _candidate(0, 8, 0.8),
        _candidate(2, 9, 0.5),
        _candidate(2, 4, 0.5),
    ]
    assert choose.best_prior_entities(mentions, own) == [8, 4]
    assert choose.best_prior_entities(mentions, []) == []
    twice = [_candidate(0, 3), _candidate(1, 3)]
    assert choose.best_prior_entities(mentions, twice) == [3]


def test_entity_text_without_description_is_the_name():
    template = "a photo of {name}, {description}"
    assert embed.entity_text(template, "cat", "") == "cat"
    assert embed.entity_text(template, "cat", "animal") == "a photo of cat, animal"


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-9, 9, width=32)), max_size=30))
def test_sums_by_column(pairs):
    columns = np.array([column for column, _ in pairs], np.int64)
    values = np.array([[value, 2 * value] for _, value in pairs], np.float32).reshape(-1, 2)
    expected = np.ones((6, 2))
    np.add.at(expected, columns, values)
    total = np.ones((6, 2))
    z_scores.add_by(total, columns, values.astype(np.float64))
    np.testing.assert_allclose(total, expected, atol=1e-9)


def test_deviations_are_z_scores_along_any_direction():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5))
    centred = x - x.mean(0)
    direction = rng.normal(size=5)
    spread = np.full(200, direction @ (centred.T @ centred / len(x)) @ direction)
    along = x @ direction
    np.testing.assert_allclose(
        z_scores.deviations(centred @ direction, spread), (along - along.mean()) / along.std()
    )
    zero = z_scores.deviations(np.zeros(3), np.array([0.0, -1e-18, 1e-15]))
    assert not zero.any()

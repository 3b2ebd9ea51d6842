"""How entities are chosen from scores, by cases and against plain numpy."""

import numpy as np
import pyarrow as pa
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.linking import rows as link_rows
from data_prep.selection import choose, embed, z_scores
from tests import decision

_RULE = choose.Rule(prior_weight=1.0, kin_weight=2.0, min_probability=0.1, max_labels=2)


def _shard(rows):
    """`LinkRows` of lists of (mention, entity, prior)."""
    flat = [(row, *candidate) for row, own in enumerate(rows) for candidate in own]
    row, mention, entity, prior = np.array(flat, np.float64).reshape(-1, 4).T
    return link_rows.LinkRows(
        pa.array([str(row) for row in range(len(rows))]),
        np.full(len(rows), 4),
        row.astype(np.int64),
        mention.astype(np.int32),
        entity.astype(np.int32),
        prior.astype(np.float32),
    )


def _by_row(chosen, rows):
    return [chosen.entity[chosen.row == row].tolist() for row in range(rows)]


def _choose(own, shown, rule=_RULE, kin=None, fit=None):
    """The labels of one picture, of candidates by what they are shown with, by entity."""
    links = _shard([own])
    values = [(1, 1, (kin or {}).get(e, 0), shown[e], (fit or {}).get(e, 1)) for _, e, _ in own]
    known = choose.Evidence(*np.array(values, np.float64).reshape(-1, 5).T)
    found = choose.choose(links, known, rule)
    return dict(zip(found.entity.tolist(), found.probability.tolist(), strict=True))


def test_the_senses_of_a_name_share_it_and_the_mentions_of_a_caption_explain_one_picture():
    # One mention: odds 0.8 / 0.2 = 4, so 4 / 5 of what it means.
    assert _choose([(0, 1, 1.0)], {1: 0.8}) == {1: 0.8}
    assert _choose([(0, 1, 0.75), (0, 2, 0.25)], {1: 0.8, 2: 0.8}) == {1: 0.6}
    # A name that means nothing in the base as often as not.
    assert _choose([(0, 1, 0.5)], {1: 0.8}) == {1: round(0.4, 4)}
    # Two mentions: odds of 4 and 1.
    assert _choose([(0, 1, 1.0), (1, 2, 1.0)], {1: 0.8, 2: 0.5}) == {1: 0.6667, 2: 0.1667}
    # The same entity twice is no second explanation.
    assert _choose([(0, 1, 1.0), (1, 1, 1.0)], {1: 0.8}) == {1: 0.8}


def test_choice_between_senses_weighs_prior_kin_and_picture():
    own = [(0, 1, 0.75), (0, 2, 0.25)]
    assert [*_choose(own, {1: 0.1, 2: 0.8})] == [2]
    assert [*_choose(own, {1: 0.8, 2: 0.8}, kin={2: 0.5})] == [1]  # log 3 = 1.1 > 1
    assert [*_choose(own, {1: 0.8, 2: 0.8}, kin={2: 0.6})] == [2]
    assert _choose(own, {1: 0.8, 2: 0.8}, fit={2: 9.0}) == {2: 0.6}


def test_what_is_no_label_takes_its_share():
    assert _choose([(0, 1, 0.75), (0, 2, 0.25)], {1: 0, 2: 0.8}) == {2: 0.2}
    assert _choose([(0, 1, 1.0)], {1: 0}) == {}


def test_choice_limits():
    own = [(i, i, 1.0) for i in range(4)]
    known = {0: 0.5, 1: 0.45, 2: 0.4, 3: 0.1}
    assert [*_choose(own, known)] == [0, 1]
    assert [*_choose(own, known, _RULE._replace(max_labels=9))] == [0, 1, 2]
    assert [*_choose(own, known, _RULE._replace(min_probability=0.27))] == [0]
    assert _choose(own, known, _RULE._replace(min_probability=0.9)) == {}
    assert _choose([], {}) == {}


def test_equal_senses_are_decided_by_prior_and_then_by_row():
    known = {5: 0.5, 6: 0.5}
    assert [*_choose([(0, 5, 0.4), (0, 6, 0.6)], known)] == [6]
    assert [*_choose([(0, 6, 0.5), (0, 5, 0.5)], known)] == [5]


_CANDIDATES = st.tuples(
    st.integers(0, 3),  # mention
    st.integers(0, 6),  # entity
    st.sampled_from([0.01, 0.25, 0.5, 1.0]),  # prior, often equal
)
_KNOWN = st.tuples(
    st.sampled_from([0.0, 0.3, 0.5]),  # kinship
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),  # shown
    st.sampled_from([0.5, 1.0, 2.0]),  # fit
)


@given(
    st.lists(
        st.tuples(
            st.lists(_CANDIDATES, max_size=8, unique_by=lambda c: c[:2]),
            st.lists(_KNOWN, min_size=7, max_size=7),
        ),
        max_size=6,
    ),
    st.sampled_from([0.0, 0.25]),
)
# Both mentions of entity 2 mean it by 0.4, but for the last bits.
@example(
    [
        (
            [(0, 2, 0.25), (1, 0, 0.25), (2, 1, 0.01), (2, 4, 0.5), (2, 2, 0.25)],
            [(0.0, 0.1, 2.0), (0.5, 0.0, 1.0), (0.5, 0.1, 2.0), *[(0.5, 0.0, 1.0)] * 4],
        )
    ],
    0.0,
)
def test_a_shard_is_decided_as_its_pictures_are(pictures, min_probability):
    rule = _RULE._replace(min_probability=min_probability)
    links = _shard([own for own, _ in pictures])
    places = zip(links.row, links.entity, strict=True)
    known = np.array([(1, 1, *pictures[row][1][entity]) for row, entity in places]).reshape(-1, 5)
    found = choose.choose(links, choose.Evidence(*known.T), rule)
    likeliest = choose.choose_by_text(links)
    expected, by_text = [], []
    for own, numbers in pictures:
        own = [(mention, entity, float(np.float32(prior))) for mention, entity, prior in own]
        known = dict(enumerate(numbers))
        expected.append([e for e, _ in decision.choose(own, known, rule._asdict())[0]])
        by_text.append(decision.choose_by_text(own))
    assert _by_row(found, len(pictures)) == expected
    assert _by_row(likeliest, len(pictures)) == by_text
    for row, entity, prior in zip(likeliest.row, likeliest.entity, likeliest.score, strict=True):
        assert prior == np.float32(max(p for _, e, p in pictures[row][0] if e == entity))


def test_unscored_pictures_get_nothing():
    links = _shard([[(0, 1, 1.0)], [(0, 1, 1.0), (0, 2, 0.5)]])
    unknown = np.array([np.nan, 0.5, np.nan])
    found = choose.choose(links, choose.Evidence(*[unknown] * 5), _RULE)
    assert _by_row(found, 2) == [[], [1]]


def test_by_text_an_entity_of_two_mentions_stands_once():
    own = [(0, 7, 0.2), (0, 8, 0.8), (2, 9, 0.5), (2, 4, 0.5)]
    links = _shard([own, [], [(0, 3, 0.25), (1, 3, 1.0)]])
    chosen = choose.choose_by_text(links)
    assert _by_row(chosen, 3) == [[8, 4], [], [3]]
    assert chosen.z_score[-1] == 1.0


def test_by_text_what_is_no_label_is_none():
    links = _shard([[(0, 7, 0.6), (0, 8, 0.4)], [(0, 8, 1.0)]])
    assert _by_row(choose.choose_by_text(links, np.array([7])), 2) == [[], [8]]


def test_by_text_a_mention_that_more_likely_means_nothing_has_no_entity():
    links = _shard([[(0, 7, 0.3), (0, 8, 0.2)], [(0, 7, 0.4), (0, 8, 0.3), (1, 9, 0.4)]])
    assert _by_row(choose.choose_by_text(links), 2) == [[], [7]]
    as_likely = _shard([[(0, 7, 0.5)], [(0, 7, 0.25)]])
    assert _by_row(choose.choose_by_text(as_likely), 2) == [[7], []]


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


@given(st.integers(0, 99))
def test_the_sum_of_two_directions_is_told_in_its_own_deviations(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4))
    x -= x.mean(0)
    text, picture = (x @ rng.normal(size=4) for _ in range(2))
    text, picture = text / text.std(), picture / picture.std()
    both = text + 1.5 * picture
    found = z_scores.added(text, picture, np.full(50, 1.5), np.full(50, np.mean(text * picture)))
    np.testing.assert_allclose(found, both / both.std(), atol=1e-9)

"""Durations as data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mofi_jax.common.errors import BadInput
from mofi_jax.training import cadence

CLOCK = cadence.Clock(batch_size=100, examples_per_epoch=1050, total_steps=200)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("7 steps", 7),
        ("1 step", 1),
        ("2 epochs", 21),
        ("1 epoch", 10),
        ("1e3 examples", 10),
        ("1 examples", 1),
        ("25 percent", 50),
        ("0 steps", 0),
        ("0.1 percent", 1),
    ],
)
def test_steps(duration, steps):
    assert CLOCK.steps(duration, key="k") == steps


@given(st.text(max_size=12))
def test_anything_else_is_refused_with_the_key(text):
    message = ""
    try:
        assert CLOCK.steps(text, key="config.total") >= 0
    except BadInput as error:
        message = str(error)
    assert message == "" or message.startswith("config.total=")


def test_total_cannot_be_a_percentage():
    with pytest.raises(BadInput, match="percentage of itself"):
        cadence.make_clock("50 percent", batch_size=10, examples_per_epoch=100)


def test_a_total_beyond_counting_is_refused():
    with pytest.raises(BadInput, match="more steps than can be counted"):
        cadence.make_clock("1e10 steps", batch_size=10, examples_per_epoch=100)


def test_due_at_multiples_and_at_the_end():
    clock = cadence.Clock(batch_size=1, examples_per_epoch=1, total_steps=10)
    assert [s for s in range(1, 11) if clock.due(s, 4)] == [4, 8, 10]
    assert not any(clock.due(s, 0) for s in range(11))

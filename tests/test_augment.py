"""RandAugment: every operation of its set, and how they are drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mofi_jax.common.errors import BadInput
from mofi_jax.data import augment, ops

NAMES = tuple(augment.OPERATIONS)
STRONG = [name for name in NAMES if name not in ("identity", "auto_contrast", "equalize")]
SIGNED = [name for name in STRONG if name not in augment.ONE_SIDED]


def picture(height=40, width=52):
    """Colours, edges and some noise, between 20 and 200: something for every operation to do."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([20 + 3 * x, 20 + 4 * y, 200 - 2 * x], -1).astype(np.float64)
    image[10:20, 10:30] = (190, 40, 60)
    image += np.random.default_rng(0).normal(0, 6, image.shape)
    return np.clip(image, 20, 200).astype(np.uint8)


def test_the_set_is_the_papers():
    assert len(NAMES) == 14
    assert set(NAMES) == {
        *("identity", "auto_contrast", "equalize", "rotate", "solarize", "color", "posterize"),
        *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x"),
        "translate_y",
    }


@pytest.mark.parametrize("name", STRONG)
def test_strength_zero_is_the_identity(name):
    np.testing.assert_array_equal(augment.OPERATIONS[name](picture(), 0.0), picture())


@pytest.mark.parametrize(
    ("name", "strength"),
    [(n, s) for n in NAMES for s in (1.0, 0.3)] + [(n, -1.0) for n in SIGNED],
)
def test_every_operation_gives_another_picture_of_the_same_kind(name, strength):
    image = picture()
    result = augment.OPERATIONS[name](image, strength)
    assert (result.shape, result.dtype) == (image.shape, np.uint8)
    assert (result == image).all() == (name == "identity")
    np.testing.assert_array_equal(image, picture())  # the argument is as it was
    np.testing.assert_array_equal(augment.OPERATIONS[name](image, strength), result)


@pytest.mark.parametrize("name", SIGNED)
def test_directions_differ(name):
    operation = augment.OPERATIONS[name]
    assert (operation(picture(), 0.5) != operation(picture(), -0.5)).any()


@pytest.mark.parametrize("name", STRONG)
def test_more_strength_does_more(name):
    """Mean change of a pixel."""

    def change(strength):
        result = augment.OPERATIONS[name](picture(), strength)
        return np.abs(result.astype(int) - picture()).mean()

    assert 0 < change(0.4) < change(1.0)


def test_what_some_operations_do():
    image = picture()
    run = augment.OPERATIONS
    np.testing.assert_array_equal(run["solarize"](image, 1.0), 255 - image)
    np.testing.assert_array_equal(run["posterize"](image, 1.0), image & 0xF0)
    shift = round(150 / 331 * image.shape[1])
    moved = run["translate_x"](image, shift / (150 / 331 * image.shape[1]))
    np.testing.assert_array_equal(moved[:, shift:], image[:, :-shift])
    assert (moved[:, :shift] == 128).all()
    # A third of a right angle: the centre stays, the corners come from outside.
    rotated = run["rotate"](np.full((41, 41, 3), 200, np.uint8), 1.0)
    assert (rotated[20, 20] == 200).all()
    assert (rotated[0, 0] == 128).all()
    grey = run["color"](image, -1.0).astype(int)
    assert np.ptp(grey, -1).mean() < 0.15 * np.ptp(image.astype(int), -1).mean()
    for name in ("auto_contrast", "equalize"):
        stretched = run[name](image, 0.0)
        assert stretched.min() < 5
        assert stretched.max() > 250


def test_draws_depend_on_the_generator_alone():
    results = [
        ops.apply("randaugment(2, 9)", picture(), np.random.default_rng(seed))
        for seed in (1, 1, 2, 3, 4)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    assert len({r.tobytes() for r in results}) >= 3


def test_every_operation_is_drawn_equally_often(monkeypatch):
    drawn = []
    counting = {name: (lambda im, s, n=name: drawn.append((n, s)) or im) for name in NAMES}
    monkeypatch.setattr(augment, "OPERATIONS", counting)
    rng = np.random.default_rng(0)
    for _ in range(1400):
        augment.randaugment(picture(), rng, num_ops=2, magnitude=5)
    assert len(drawn) == 2800
    for name in NAMES:
        strengths = [s for n, s in drawn if n == name]
        assert 140 < len(strengths) < 260  # 200 expected, standard deviation 14
        assert set(strengths) == ({0.5} if name in augment.ONE_SIDED else {0.5, -0.5})


def test_no_operation_leaves_the_picture():
    result = ops.apply("randaugment(0, 9)", picture(), np.random.default_rng(0))
    np.testing.assert_array_equal(result, picture())


@given(
    num_ops=st.integers(0, 3),
    magnitude=st.one_of(st.integers(0, 10), st.floats(0, 10)),
    seed=st.integers(0, 2**32),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
)
def test_any_argument_that_is_taken_works_on_any_picture(num_ops, magnitude, seed, size):
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    spec = f"randaugment({num_ops}, magnitude={magnitude!r})"
    result = ops.apply(spec, image, np.random.default_rng(seed))
    assert (result.shape, result.dtype) == (image.shape, np.uint8)


@given(
    st.one_of(
        st.tuples(st.integers(max_value=-1), st.just(9)),
        st.tuples(st.just(2), st.floats(min_value=10, exclude_min=True, allow_infinity=False)),
        st.tuples(st.just(2), st.floats(max_value=0, exclude_max=True, allow_infinity=False)),
        st.tuples(st.floats(0, 3), st.just(9)),
        st.tuples(st.text(max_size=3), st.just(9)),
        st.tuples(st.just(2), st.one_of(st.none(), st.text(max_size=3))),
    )
)
def test_other_arguments_are_refused_in_one_sentence(arguments):
    with pytest.raises(BadInput, match=r"(Wrong arguments|cannot be read)"):
        ops.parse(f"decode|randaugment({arguments[0]!r}, {arguments[1]!r})")

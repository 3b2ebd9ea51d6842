"""Pictures: good and bad ones, and the hash that near-copies share."""

import io
import zlib

import cv2
import hypothesis
import imagehash
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from data_prep.pairs import pictures
from data_prep.pairs.samples import Rejected
from mofi_jax.data import ops
from tests.inputs import picture, run


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        ("jpg", picture(kind="jpeg", mode="CMYK")),
        ("jpeg", picture(kind="jpeg", mode="L")),
        ("PNG", picture(mode="RGBA")),
        ("webp", picture(kind="webp")),
        ("gif", picture(kind="gif", mode="P")),
        ("jpg", picture(kind="png")),  # the name lies, as it often does on the web
    ],
)
def test_odd_pictures_are_pairs(tmp_path, suffix, data):
    pairs, rejects, _ = run(tmp_path, [(f"a.{suffix}", data), ("a.txt", b"x")])
    assert rejects == {}
    assert (pairs["a"]["width"], pairs["a"]["height"]) == (40, 40)


def _wide_jpeg():
    return cv2.imencode(".jpg", np.zeros((16, 30_000, 3), np.uint8))[1].tobytes()


def _bomb():
    """The header of a PNG of 30,000 x 30,000 pixels; to decode it would take 2.7 GB."""
    data = bytearray(picture())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    # The checksum of the header has to be right for the size to be believed.
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


JPEG = picture(64, 64, "jpeg")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_picture"),
        (b"<html>404</html>", "not_a_picture"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (picture()[:-100], "truncated"),
        (picture(1, 1), "too_small"),
        (picture(1, 1, "jpeg"), "too_small"),
        (picture(15, 40), "too_small"),
        (_wide_jpeg(), "too_wide"),
        (picture(20, 81), "too_wide"),
        (_bomb(), "too_many_pixels"),
        (picture(1100, 1000, "jpeg"), "too_many_pixels"),
    ],
)
def test_pictures_that_cannot_be_used_are_told(tmp_path, data, reason):
    pairs, rejects, counts = run(
        tmp_path, [("bad.jpg", data), ("bad.txt", b"x"), ("ok.png", picture()), ("ok.txt", b"x")]
    )
    assert rejects == {"bad": reason}
    assert list(pairs) == ["ok"]
    assert (counts["pairs"], counts["rejected"]) == (1, 1)


def test_a_corrupt_jpeg_is_told(tmp_path):
    data = bytearray(picture(64, 64, "png"))
    data[len(data) // 2] ^= 0xFF
    _, rejects, _ = run(tmp_path, [("bad.png", bytes(data)), ("bad.txt", b"x")])
    assert rejects["bad"] in ("corrupt", "truncated")


def test_a_file_too_large_for_a_picture_is_not_decoded(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    with pytest.raises(Rejected, match="too_many_bytes"):
        pictures.check_picture(JPEG, {})


# ------------------------------------------------------------------------------------------- hashes


def scene(seed, width=320, height=240):
    """A picture with large forms, as photos have and noise has not."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (6, 8, 3)).astype(np.uint8)
    rgb = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        colour = tuple(int(c) for c in rng.integers(0, 255, 3))
        cv2.circle(rgb, centre, int(rng.integers(10, 60)), colour, -1)
    return rgb


def distance(a, b):
    return int(pictures.hamming(np.int64(a), np.int64(b)))


def oracle(rgb):
    return int(str(imagehash.phash(Image.fromarray(rgb))), 16)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (320, 240), (1000, 700)])
def test_the_hash_is_that_of_imagehash(size):
    apart = []
    for seed in range(20):
        rgb = scene(seed, *size)
        ours = pictures.perceptual_hash(rgb)
        apart.append((ours & (2**64 - 1) ^ oracle(rgb)).bit_count())
    assert max(apart) <= 2
    assert np.mean(apart) < 0.5


def reencoded(rgb, quality):
    return ops.decode_rgb(ops.encode_jpeg(rgb, quality))


@pytest.mark.parametrize(
    "change",
    [
        lambda rgb: reencoded(rgb, 50),
        lambda rgb: reencoded(rgb, 90),
        lambda rgb: cv2.resize(rgb, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
        lambda rgb: cv2.resize(rgb, None, fx=1.7, fy=1.7, interpolation=cv2.INTER_CUBIC),
        lambda rgb: reencoded(cv2.resize(rgb, (256, 192), interpolation=cv2.INTER_AREA), 75),
        lambda rgb: np.clip(rgb.astype(np.int16) + 12, 0, 255).astype(np.uint8),
    ],
    ids=["quality 50", "quality 90", "half size", "enlarged", "shrunk and encoded", "lighter"],
)
def test_near_copies_are_within_six_bits_and_as_far_as_imagehash_has_them(change):
    for seed in range(20):
        rgb = scene(seed)
        changed = change(rgb)
        ours = distance(pictures.perceptual_hash(rgb), pictures.perceptual_hash(changed))
        theirs = (oracle(rgb) ^ oracle(changed)).bit_count()
        assert ours <= 6
        assert abs(ours - theirs) <= 4


def test_different_pictures_are_far_apart():
    hashes = np.array([pictures.perceptual_hash(scene(seed)) for seed in range(40)])
    apart = pictures.hamming(hashes[:, None], hashes[None])
    assert apart.dtype == np.uint8
    assert (np.diag(apart) == 0).all()
    np.testing.assert_array_equal(apart, apart.T)
    assert apart[~np.eye(40, dtype=bool)].min() > 12


@hypothesis.given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_hamming_counts_bits(a, b):
    assert distance(a, b) == ((a ^ b) & (2**64 - 1)).bit_count()


def test_pairs_carry_the_hash_of_the_upright_picture(tmp_path):
    rgb = scene(1, 64, 48)
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(np.rot90(rgb)).save(data, "jpeg", exif=exif, quality=95)
    plain = io.BytesIO()
    Image.fromarray(rgb).save(plain, "png")
    members = [("a.jpg", data.getvalue()), ("a.txt", b"x")]
    pairs, _, _ = run(tmp_path, [*members, ("b.png", plain.getvalue()), ("b.txt", b"x")])
    assert (pairs["a"]["width"], pairs["a"]["height"]) == (64, 48)
    assert distance(pairs["a"]["phash"], pairs["b"]["phash"]) <= 4
    assert pairs["b"]["phash"] == pictures.perceptual_hash(rgb)

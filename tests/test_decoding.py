"""Images that cost more than they are: bombs, endless headers, damaged metadata; what is spared."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep.dataset import shards
from data_prep.pairs import pictures
from mofi_jax.data import decoding, ops
from tests.inputs import picture

LIMITS = {"min_side": 16, "max_aspect": 4.0, "max_pixels": ops.MAX_PIXELS}
JPEG, PNG, GIF = picture(48, 40, "jpeg"), picture(48, 40), picture(48, 40, "gif", "P")


def saved(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def smooth(height=40, width=48):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 5, 255 - x * 2 - y], -1).astype(np.uint8)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(data)) + data


def tiff(*entries, extra=b""):
    return (
        struct.pack("<2sHIH", b"II", 42, 8, len(entries))
        + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        + bytes(4)
        + extra
    )


def declaring(data, width, height):
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def gif_with(block):
    start = 13 + 3 * (2 << (GIF[10] & 7))
    return GIF[:start] + block + GIF[start:]


def scans(count):
    data = saved(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xc4"), len(data) - 2
    return data[:end] + data[last:end] * count + data[end:]


ENDLESS = {
    "chunks of a PNG": PNG[:33] + chunk(b"teSt", b"") * 3_000 + PNG[33:],
    "texts of a PNG": PNG[:33] + chunk(b"tEXt", b"k\0v") * 3_000 + PNG[33:],
    "blocks of a GIF": gif_with(b"\x21\xfe" + b"\1x" * 3_000 + b"\0"),
    "segments of a JPEG": JPEG[:2] + b"\xff\xfe\0\2" * 3_000 + JPEG[2:],
    "fill bytes of a JPEG": JPEG[:2] + b"\xff" * 3_000 + JPEG[2:],
    "EXIF of a JPEG": JPEG[:2] + segment(0xE1, b"Exif\0\0".ljust(65_533)) * 300 + JPEG[2:],
}


@pytest.mark.parametrize("data", ENDLESS.values(), ids=ENDLESS)
def test_headers_without_end_are_given_up(data, monkeypatch):
    monkeypatch.setattr(decoding._File, "left", 2_000)
    monkeypatch.setattr(decoding, "_MAX_JPEG_HEADER", 10_000_000)
    with pytest.raises(ops.UndecodableImage, match="corrupt"):
        ops.decode_rgb(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (declaring(JPEG, 8000, 7999), "truncated"),
        (declaring(JPEG, 2000, 2000), "truncated"),
        (saved(Image.new("1", (7999, 7999)), "PNG"), "truncated"),
        (scans(200), "corrupt"),
        (saved(Image.new("L", (5000, 5000)), "WEBP", method=0), "too_many_pixels"),
        (tiff((256, 4, 1, 64), (257, 4, 1, 64)).ljust(48_000_001, b"\0"), "too_many_bytes"),
    ],
)
def test_the_declared_size_is_held_against_the_file(data, reason, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(cv2, "imdecode", None)
    for decode in (ops.decode_rgb, lambda data: ops.apply("decode", data)):
        with pytest.raises(ops.UndecodableImage) as caught:
            decode(data)
        assert str(caught.value) == reason


def test_flat_images_of_real_sizes_pass():
    for kind, size in (("PNG", 4200), ("GIF", 3000), ("WEBP", 3000), ("JPEG", 3000)):
        flat = Image.new("L", (size, size), 200)
        data = saved(flat, kind, **({"method": 0, "lossless": True} if kind == "WEBP" else {}))
        with ops.open_picture(data) as opened:
            assert opened.size == (size, size)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK", "1"])
def test_large_images_are_converted_in_strips_that_leave_no_trace(mode, monkeypatch):
    image = Image.fromarray(smooth()).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 7
    data = saved(image, "JPEG" if mode == "CMYK" else "PNG", exif=exif)
    whole, hashed = ops.decode_rgb(data), pictures.check_picture(data, LIMITS)
    monkeypatch.setattr(decoding, "_STRIP", 100)
    monkeypatch.setattr(pictures, "_STRIP", 100)
    np.testing.assert_array_equal(ops.decode_rgb(data), whole)
    assert pictures.check_picture(data, LIMITS) == hashed


@pytest.mark.parametrize("how", range(1, 9))
def test_every_orientation_is_that_of_pillow_for_both_decoders(how):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = how
    data = saved(Image.fromarray(smooth()), "JPEG", quality=95, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(ops.decode_rgb(data), expected)
    assert np.abs(ops.apply("decode", data).astype(int) - expected).max() < 8


ROTATED = (0x0112, 3, 1, 6)
EXIF = {
    "sound": (tiff(ROTATED), True),
    "written twice": (b"Exif\0\0" + tiff(ROTATED), True),
    "another tag is wrong": (
        tiff(ROTATED, (0x011A, 10, 1, 38), extra=struct.pack("<ii", -1, 0)),
        True,
    ),
    "empty": (b"", False),
    "no TIFF": (b"garbage garbage", False),
    "cut": (struct.pack("<2sHIH", b"II", 42, 8, 9), False),
    "of another kind": (tiff((0x0112, 2, 1, 0x36)), False),
    "out of range": (tiff((0x0112, 3, 1, 9)), False),
    "beyond its end": (tiff((0x0112, 3, 1 << 30, 1 << 30)), False),
    "a circle": (tiff((0x8769, 4, 1, 8)), False),
}


@pytest.mark.parametrize(("exif", "turned"), EXIF.values(), ids=EXIF)
def test_broken_exif_costs_the_orientation_and_not_the_image(exif, turned):
    """Whether read strictly, by the decoder of training, or written to a shard first."""
    shape = (48, 40, 3) if turned else (40, 48, 3)
    plain = saved(Image.fromarray(smooth()), "JPEG", quality=95)
    jpeg = plain[:2] + segment(0xE1, b"Exif\0\0" + exif) + plain[2:]
    png = saved(Image.fromarray(smooth()), "PNG")
    png = png[:33] + chunk(b"eXIf", exif) + png[33:]
    strict = ops.decode_rgb(jpeg)
    assert strict.shape == ops.decode_rgb(png).shape == shape
    written, width, height = shards.to_jpeg(jpeg, 512, 95)
    assert (height, width, 3) == shape
    for data in (jpeg, written):
        assert np.abs(ops.apply("decode", data).astype(int) - strict).max() < 12


def test_metadata_are_unpacked_to_a_limit():
    flat = zlib.compress(bytes(100_000_000), 1)
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0")):
        with pytest.raises(ops.UndecodableImage):
            ops.decode_rgb(PNG[:33] + chunk(kind, head + flat) + PNG[33:])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_what_moves_the_first_frame_is_taken(kind):
    first, second = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(first, kind, save_all=True, append_images=[second] * 3, **options)
    assert (ops.decode_rgb(data) == [255, 0, 0]).all()

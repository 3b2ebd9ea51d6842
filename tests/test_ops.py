"""Picture operations: strict decoding of real files, the mini-language, augmentation by seed."""

import functools
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from mofi_jax.common.errors import BadInput
from mofi_jax.data import decoding, ops


def gradient(height=20, width=30):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 8, y * 12, 255 - x * 8], -1).astype(np.uint8)


def saved(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_decode_exactly(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(gradient()), kind, **options)
    np.testing.assert_array_equal(ops.decode_rgb(data), gradient())


def test_grey_palette_gif_and_cmyk_become_rgb():
    picture = Image.fromarray(gradient())
    grey = ops.decode_rgb(saved(picture.convert("L"), "JPEG", quality=95))
    assert grey.shape == (20, 30, 3)
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    palette = ops.decode_rgb(saved(picture.convert("P"), "PNG"))
    assert np.abs(palette.astype(int) - gradient()).mean() < 20
    gif = ops.decode_rgb(saved(picture.convert("P"), "GIF"))
    np.testing.assert_array_equal(gif, palette)
    cmyk = ops.decode_rgb(saved(picture.convert("CMYK"), "JPEG", quality=98))
    assert np.abs(cmyk.astype(int) - gradient()).mean() < 6


def test_sixteen_bits_keep_their_high_byte():
    values = (np.arange(600).reshape(20, 30) * 100).astype(np.uint16)
    rgb = ops.decode_rgb(saved(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(rgb[..., 1], values >> 8)


def test_alpha_lies_over_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 3] = 255
    rgb = ops.decode_rgb(saved(Image.fromarray(rgba), "PNG"))
    assert (rgb[:2] == 0).all()
    assert (rgb[2:] == 255).all()


def test_a_cameras_orientation_is_obeyed_by_both_decoders():
    picture = Image.fromarray(cv2.GaussianBlur(gradient(), (5, 5), 0))
    exif = picture.getexif()
    exif[0x0112] = 6  # a quarter turn
    data = saved(picture, "JPEG", quality=95, exif=exif)
    strict, fast = ops.decode_rgb(data), ops.apply("decode", data)
    assert strict.shape == fast.shape == (30, 20, 3)
    assert np.abs(strict.astype(int) - fast).max() < 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_pictures_are_refused(kind):
    data = saved(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), kind
    )
    with pytest.raises(ops.UndecodableImage) as caught:
        ops.decode_rgb(data[: len(data) // 2])
    assert str(caught.value) == "truncated"


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_with_a_reason(data):
    with pytest.raises(ops.UndecodableImage) as caught:
        ops.decode_rgb(data)
    assert str(caught.value) in ("empty", "not_a_picture", "truncated", "corrupt")


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        b"P6 1 1 255 abc",
        b"SIMPLE  =                    T" + b" " * 3000,
    ],
    ids=["EPS", "PPM", "FITS"],
)
def test_formats_that_no_web_has_are_no_pictures(data):
    """Pillow would hand an EPS to Ghostscript, whatever the file is called."""
    with pytest.raises(ops.UndecodableImage) as caught:
        ops.apply("decode", data)
    assert str(caught.value) == "not_a_picture"


def test_a_line_of_pixels_is_not_enlarged_to_gigabytes(monkeypatch):
    monkeypatch.setattr(cv2, "resize", None)
    line = saved(Image.new("RGB", (20_000, 1)), "PNG")
    with pytest.raises(ops.UndecodableImage, match="too_elongated"):
        ops.apply("decode|resize_short(224)|center_crop(224)", line)
    with pytest.raises(BadInput, match="Wrong arguments"):
        ops.parse("decode|resize_short(100000)")


def test_what_cameras_and_newer_phones_write():
    picture = Image.fromarray(cv2.GaussianBlur(gradient(), (5, 5), 0))
    kinds = {"MPO": {"save_all": True, "append_images": [picture]}}
    if features.check("avif"):
        kinds["AVIF"] = {}
    for kind, options in kinds.items():
        rgb = ops.decode_rgb(saved(picture, kind, quality=95, **options))
        assert np.abs(rgb.astype(int) - np.asarray(picture)).mean() < 6


def declaring(data, height, width):
    """A JPEG or PNG whose header says another size."""
    if data[:2] == b"\xff\xd8":
        at = data.index(b"\xff\xc0") + 5
        return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(8001, 8000), (30_000, 30_000)])
def test_pictures_that_declare_too_many_pixels_are_not_decoded(kind, size, monkeypatch):
    data = declaring(saved(Image.fromarray(gradient()), kind), *size)
    monkeypatch.setattr(cv2, "imdecode", None)
    monkeypatch.setattr(Image.Image, "load", None)
    for decode in (ops.decode_rgb, lambda d: ops.apply("decode", d)):
        with pytest.raises(ops.UndecodableImage) as caught:
            decode(data)
        assert str(caught.value) == "too_many_pixels"


def test_the_fast_decoder_takes_only_jpegs_whose_size_is_plain(monkeypatch):
    data = saved(Image.fromarray(gradient()), "JPEG", quality=95, exif=Image.Exif())
    assert decoding._jpeg_header(data)[0] == 600
    # A marker without length, after which a length would be read out of what follows.
    hidden = data[:2] + b"\xff\xd0" + data[2:]
    assert decoding._jpeg_header(hidden) is None
    assert decoding._jpeg_header(data[:20]) is None
    monkeypatch.setattr(cv2, "imdecode", None)
    assert ops.apply("decode", hidden).shape == (20, 30, 3)


def test_jpeg_round_trip():
    rgb = cv2.GaussianBlur(gradient(), (5, 5), 0)
    again = ops.decode_rgb(ops.encode_jpeg(rgb, 98))
    assert np.abs(again.astype(int) - rgb).max() < 12
    assert ops.encode_jpeg(rgb, 90) == ops.encode_jpeg(rgb, 90)


def test_decode_operation_equals_the_strict_decoder_on_png():
    data = saved(Image.fromarray(gradient()), "PNG")
    np.testing.assert_array_equal(ops.apply("decode", data), gradient())


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (7, 100), (16, 16)])
def test_evaluation_preprocessing_gives_squares(height, width):
    spec = "resize_short(16)|center_crop(16)"
    assert ops.apply(spec, gradient(height, width)).shape == (16, 16, 3)


def torchvision_center(image, size):
    """transforms.CenterCrop, of which the CPU build of torch has no torchvision to be had."""
    top, left = (round((side - size) / 2.0) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def torchvision_short(height, width, size):
    """transforms.Resize(size): (height, width)."""
    short, long = sorted((height, width))
    long = int(size * long / short)
    return (long, size) if height > width else (size, long)


def original_mofi(rgb, size):
    import torch

    tensor = torch.tensor(rgb).permute(2, 0, 1)[None].float() / 255
    shape = torchvision_short(*rgb.shape[:2], size)
    resized = torch.nn.functional.interpolate(tensor, size=shape, mode="bilinear")
    return torchvision_center(resized[0].permute(1, 2, 0).numpy() * 255, size)


def original_of_pillow(rgb, size, short):
    shape = torchvision_short(*rgb.shape[:2], short)
    resized = Image.fromarray(rgb).resize(shape[::-1], Image.Resampling.BICUBIC)
    return torchvision_center(np.asarray(resized), size)


@functools.cache
def processor(kind, size):
    import transformers

    name = f"{kind}ImageProcessor"  # transformers 5 gives the plain name to another arithmetic
    of_pillow = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    wanted = {"height": size, "width": size}
    shape = {"size": {"shortest_edge": size}, "crop_size": wanted}
    shape = shape if kind == "CLIP" else {"size": wanted}
    return of_pillow(do_rescale=False, do_normalize=False, **shape)


def original_of_transformers(rgb, size, kind):
    pixels = processor(kind, size)(Image.fromarray(rgb), return_tensors="np")["pixel_values"]
    return np.moveaxis(pixels[0], 0, -1)


ORIGINALS = {
    "mofi": (original_mofi, 1.01),  # rounding to uint8, in fixed point
    "clip_torchvision": (functools.partial(original_of_pillow, short=28), 0),
    "clip_hf": (functools.partial(original_of_transformers, kind="CLIP"), 0),
    "siglip": (functools.partial(original_of_transformers, kind="Siglip"), 0),
    "dino": (functools.partial(original_of_pillow, short=32), 0),
}


@pytest.mark.parametrize("name", ops.PREPROCESSINGS)
def test_preprocessings_by_name_give_the_pixels_of_their_originals(name):
    """50 sizes, so that margins of 0 to 3 modulo 4 occur, pixels enlarged and pixels shrunk."""
    rng = np.random.default_rng(0)
    original, most = ORIGINALS[name]
    margins = set()
    for height, width in rng.integers(20, 90, (50, 2)):
        rgb = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (3, 3), 0)
        ours = ops.decode_to(28, name, saved(Image.fromarray(rgb), "PNG"))
        assert np.abs(ours - original(rgb, 28).astype(float)).max() <= most, (height, width)
        margins |= {(side - 28) % 4 for side in torchvision_short(height, width, 28)}
    assert margins == {0, 1, 2, 3}


def test_an_odd_margin_is_cut_as_the_original_cuts_it():
    """With half a pixel to decide, torchvision rounds to even and transformers down."""
    column = np.arange(40, dtype=np.uint8)[None, :, None].repeat(40, 0).repeat(3, 2)
    first = {}
    for odd in ("even", "floor"):
        crops = [ops.apply(f"center_crop(8, {odd!r})", column[:, : 8 + m]) for m in range(8)]
        first[odd] = [int(crop[0, 0, 0]) for crop in crops]
    assert first == {"even": [0, 0, 1, 2, 2, 2, 3, 4], "floor": [0, 0, 1, 1, 2, 2, 3, 3]}


def test_the_name_of_a_preprocessing_stands_alone_and_has_the_models_size():
    assert ops.expand("dino", 336) == "decode|resize_short(384, 'bicubic')|center_crop(336)"
    assert ops.expand("decode|resize(8)", 8) == "decode|resize(8)"
    for name in ops.PREPROCESSINGS:
        assert len(ops.parse(ops.expand(name, 224))) >= 2
    with pytest.raises(BadInput, match=r"Unknown picture operation 'mofi'.*or, alone, mofi, clip_"):
        ops.parse("mofi|flip")


def test_random_operations_depend_on_the_generator_alone():
    spec = "new_view(24)|flip|light|random_resized_crop(16)"
    first, again, other = (
        ops.apply(spec, gradient(), np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.dtype == np.uint8


def test_new_view_replaces_the_background_and_keeps_the_subject():
    image = np.full((40, 40, 3), 255, np.uint8)
    cv2.circle(image, (20, 20), 10, (255, 0, 0), -1)
    cv2.circle(image, (20, 20), 4, (255, 255, 255), -1)  # white, but not connected to the border
    result = ops.apply(
        "new_view(40, scale=(1.0, 1.0), rotate=0.0)", image, np.random.default_rng(0)
    ).astype(int)
    background = result[0, 0]
    assert (result[0] == background).all()
    assert (background != 255).any()
    assert (result[20, 20] == 255).all()
    assert np.abs(result[20, 13] - [255, 0, 0]).max() < 3


def test_new_view_moves_a_picture_without_plain_border_as_a_whole():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    result = ops.apply(
        "new_view(32, scale=(0.5, 0.5), rotate=0.0)", noise, np.random.default_rng(3)
    )
    changed = (result != result[0, 0]).any(-1)
    assert 0.2 < changed.mean() < 0.35  # a quarter of the square


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("decode|sharpen", "Unknown picture operation 'sharpen'.*choose from center_crop"),
        ("decode|flip(", "cannot be read"),
        ("resize_short(__import__('os'))", "cannot be read"),
        ("resize_short()", r"Wrong arguments.*resize_short\(size"),
        ("resize_short(4, 'sharp')", "Wrong arguments"),
        ("resize(100000)", "Wrong arguments"),
        ("center_crop(4, 'ceil')", "Wrong arguments"),
    ],
)
def test_bad_specifications_are_told_in_one_sentence(spec, sentence):
    with pytest.raises(BadInput, match=sentence):
        ops.parse(spec)

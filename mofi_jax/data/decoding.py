"""Image files -> pixels: which formats are read, and how much memory and time one may cost.

All that opens a stranger's image does it here: preparation, training, evaluation and inference.
Nothing here imports jax.
"""

import importlib.util
import io
import warnings

import cv2
import numpy as np
from PIL import Image


class UndecodableImage(ValueError):
    """Bytes that are not a whole image; the message is one short word for counters."""


# Common on the web and read by Pillow itself (MPO, of cameras, counts as JPEG); an EPS would go to
# Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
if importlib.util.find_spec("PIL.AvifImagePlugin"):
    _FORMATS += ("AVIF",)
# Largest image decoded, by its header: with the copies that a decoder makes half a gigabyte of
# memory; 2 kB can declare a hundred times as much.
MAX_PIXELS = 64_000_000
# libwebp keeps two canvases beside the frame, libavif the planes, libjpeg the coefficients.
_MAX_PIXELS = {"WEBP": 24_000_000, "AVIF": 32_000_000, "progressive": 50_000_000}
_MAX_TIFF_BYTES = 48_000_000  # Pillow reads its table of strips as Python numbers
# A JPEG has a bit at least for each 8 x 8 pixels. Of other formats images of one colour can have
# fewer bytes for each pixel than this, but those are not large: the header lies.
_MAX_PIXELS_PER_BYTE = {True: 512, False: 4096}  # whether it is a JPEG
_LARGE = 16_000_000  # pixels
# Scans of a JPEG that go over as many pixels take seconds; common are ten of the whole image.
_MAX_SCANNED = 32 * MAX_PIXELS
# Pillow's parsers are loops in Python; a photo of 64 Mpx takes a tenth of as many reads.
_MAX_READS = 200_000
_MAX_JPEG_HEADER = 16_000_000  # bytes, which Pillow adds up piece by piece
_MAX_EXIF = 65_536  # bytes; a JPEG segment holds no more
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"  # the latter occurs inside no scan
_STRIP = 1 << 20  # pixels that are converted at once
# Pillow's own limit is higher; between the two it would only warn, as it does of metadata.
warnings.filterwarnings("ignore", module=r"PIL\.")


class _File(io.BytesIO):
    """Bytes that a parser gives up on, where they lead it around for too long."""

    left = _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise UndecodableImage("corrupt")
        return super().read(size)


def open_picture(data: bytes) -> Image.Image:
    """Reads an image's header (format, mode, size) and decodes nothing.

    Raises UndecodableImage: "empty", "not_a_picture", "corrupt" (a header without end),
    "too_many_bytes" (TIFF), "too_many_pixels", "truncated" (not the bytes for so many pixels).
    """
    if not data:
        raise UndecodableImage("empty")
    is_jpeg = data[:2] == _JPEG
    if is_jpeg and len(data) > _MAX_JPEG_HEADER and _jpeg_header(data) is None:
        raise UndecodableImage("corrupt")
    if data[:2] in (b"II", b"MM") and len(data) > _MAX_TIFF_BYTES:
        raise UndecodableImage("too_many_bytes")
    try:
        picture = Image.open(_File(data), formats=_FORMATS)
    except UndecodableImage:
        raise
    except Image.DecompressionBombError:
        raise UndecodableImage("too_many_pixels") from None
    except Exception:  # noqa: BLE001  Pillow's parsers raise whatever the bytes lead them to
        raise UndecodableImage("not_a_picture") from None
    pixels = picture.width * picture.height
    kind = "progressive" if picture.info.get("progressive") else picture.format
    if pixels > _MAX_PIXELS.get(kind, MAX_PIXELS):
        raise UndecodableImage("too_many_pixels")
    if pixels > _MAX_PIXELS_PER_BYTE[is_jpeg] * len(data) and (is_jpeg or pixels > _LARGE):
        raise UndecodableImage("truncated")
    if is_jpeg and pixels * data.count(_SCAN) > _MAX_SCANNED:
        raise UndecodableImage("corrupt")
    return picture


def decode_rgb(data: bytes) -> np.ndarray:
    """Decodes any common picture format strictly to uint8 [height, width, 3], RGB.

    JPEG (also CMYK and grey), PNG (also palette, 16 bit), WebP, AVIF (by newer Pillows), BMP, TIFF
    and the first frame of GIF; alpha is blended with white, the EXIF orientation is applied.  Uses
    Pillow, because some OpenCV releases silently fill the rest of a truncated JPEG with grey.

    Raises UndecodableImage: as `open_picture`, "truncated" or "corrupt".
    """
    return to_rgb(open_picture(data))


def to_rgb(picture: Image.Image) -> np.ndarray:
    """The pixels of a Pillow picture of any mode, as `decode_rgb` gives those of a file.

    Raises UndecodableImage: "truncated" or "corrupt".
    """
    try:
        picture.load()
        return _to_rgb(picture)
    except UndecodableImage:
        raise
    except Exception as error:  # noqa: BLE001
        words = str(error).lower()
        cut_short = "truncated" in words or "not enough" in words or "unexpected end" in words
        raise UndecodableImage("truncated" if cut_short else "corrupt") from None


def orientation(exif: bytes | None) -> int:
    """How a camera was held, by the EXIF of an image: 1 (upright) to 8; 1 where it cannot be read.

    Preparation and training ask here alone, so that they agree on EXIF that is damaged.
    """
    if not exif:
        return 1
    try:
        tags = Image.Exif()
        tags.load(exif[:_MAX_EXIF])
        value = tags.get(0x0112)
    except Exception:  # noqa: BLE001  it costs the orientation, not the image
        return 1
    return value if value in _FLIPS else 1


# Steps along rows and columns of the upright image that follow those of the stored one; from 5 on
# rows are stored as columns.
_FLIPS = {
    **{1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1)},
    **{5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)},
}


def _upright(height: int, width: int, how: int) -> tuple[np.ndarray, np.ndarray]:
    """An image yet to be filled in, and the view of it [height, width, 3] as it is stored."""
    rgb = np.empty((height, width, 3) if how < 5 else (width, height, 3), np.uint8)
    down, across = _FLIPS[how]
    view = rgb[::down, ::across]
    return rgb, view if how < 5 else view.swapaxes(0, 1)


def _to_rgb(picture: Image.Image) -> np.ndarray:
    """In strips: each conversion of a large picture as a whole would take its size again."""
    width, height = picture.size
    rgb, stored = _upright(height, width, orientation(picture.info.get("exif")))
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height)))
        stored[top : top + rows] = _strip_to_rgb(strip)
    return rgb


def _strip_to_rgb(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # Pillow clips 16-bit grey to 255 on conversion; keep the high byte instead.
        return np.clip(np.asarray(picture) >> 8, 0, 255)[..., None]
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    # Pillow converts to the same mode by copying.
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _jpeg_header(jpeg: bytes) -> tuple[int, bytes] | None:
    """Width times height and the EXIF; None where the header is not a plain chain of segments.

    Takes 2 microseconds, where Pillow takes 20 and decoding 300.
    """
    at, end, exif = 2, min(len(jpeg) - 8, _MAX_JPEG_HEADER), b""
    while at < end and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame begins
            height, width = jpeg[at + 5 : at + 7], jpeg[at + 7 : at + 9]
            return int.from_bytes(height, "big") * int.from_bytes(width, "big"), exif
        if not (0xC0 <= marker <= 0xCF or 0xDB <= marker <= 0xFE):  # no segment with a length
            return None
        after = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker == 0xE1 and jpeg.startswith(b"Exif\0\0", at + 4) and len(exif) < _MAX_EXIF:
            exif += jpeg[at + 10 if exif else at + 4 : after]
        at = after
    return None


def decode_fast(data: bytes) -> np.ndarray:
    """As `decode_rgb`, but JPEG by OpenCV, twice as fast, which fills up what has been cut off."""
    header = _jpeg_header(data) if data[:2] == _JPEG else None
    most = min(_MAX_PIXELS["progressive"], _MAX_PIXELS_PER_BYTE[True] * len(data))
    if header and header[0] <= most and header[0] * data.count(_SCAN) <= _MAX_SCANNED:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is not None:
            how = orientation(header[1])
            if how == 1:
                return image
            rgb, stored = _upright(*image.shape[:2], how)
            stored[...] = image
            return rgb
    return decode_rgb(data)

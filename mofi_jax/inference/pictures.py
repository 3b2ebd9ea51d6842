"""Pictures in whatever form people hold them -> pixels for a model, decoded by threads."""

import collections
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops

_BYTES = (bytes, bytearray, memoryview)
# A Pillow picture may come twice, and reads its file once: by its id, one of so many.
_LOADING = tuple(threading.Lock() for _ in range(61))


def several(pictures: Any) -> Iterable[Any]:
    """One picture alone as a list of it; BadInput for what is neither a picture nor holds some."""
    one = isinstance(pictures, (str, os.PathLike, Image.Image, *_BYTES))
    # Arrays of one dimension, and columns of tables, hold paths or the like.
    if one or getattr(pictures, "ndim", 4) in (0, 2, 3):
        return [pictures]
    if not isinstance(pictures, Iterable):
        raise BadInput(_unknown("The picture", pictures))
    return pictures


def batches(
    pictures: Iterable[Any], decode: Callable[[bytes | np.ndarray], np.ndarray], size: int
) -> Iterator[UInt8[np.ndarray, "_ s s 3"]]:
    """Pixels of the pictures in order, `size` at a time; threads decode one batch ahead.

    Args:
      decode: picture file, or uint8 [h, w, 3] -> uint8 [s, s, 3].

    Raises BadInput: a picture that is none, is not there or cannot be decoded; names it.
    """
    numbered = enumerate(pictures)
    jobs: collections.deque[futures.Future] = collections.deque()
    pool = futures.ThreadPoolExecutor(thread_name_prefix="decode")
    try:

        def submit(number: int) -> None:
            for i, picture in itertools.islice(numbered, number):
                jobs.append(pool.submit(_pixels, decode, i, picture))

        submit(2 * size)
        while jobs:
            yield np.stack([jobs.popleft().result() for _ in range(min(size, len(jobs)))])
            submit(size)
    finally:
        pool.shutdown(cancel_futures=True)


def _pixels(decode: Callable[[bytes | np.ndarray], np.ndarray], i: int, picture: Any) -> np.ndarray:
    name = f"Picture {i}"
    if isinstance(picture, (str, os.PathLike)):
        name += f" ({os.fspath(picture)})"
    try:
        return decode(_content(name, picture))
    except ops.UndecodableImage as error:
        raise BadInput(
            f"{name} cannot be decoded ({error}): replace it or leave it out."
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadInput(f"{name} cannot be read ({reason}): correct its path.") from error


def _content(name: str, picture: Any) -> bytes | np.ndarray:
    if isinstance(picture, (str, os.PathLike)):
        return epath.Path(picture).read_bytes()
    if isinstance(picture, _BYTES):
        return bytes(picture)
    if isinstance(picture, Image.Image):
        # Its header is not yet its pixels.
        if picture.width * picture.height > ops.MAX_PIXELS:
            raise ops.UndecodableImage("too_many_pixels")
        with _LOADING[id(picture) % len(_LOADING)]:
            return ops.to_rgb(picture)
    if not hasattr(picture, "__array__"):
        raise BadInput(_unknown(name, picture))
    array = np.asarray(picture)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not fits or not array.size:
        raise BadInput(_unknown(name, array))
    if array.shape[2:] == (3,):
        return np.ascontiguousarray(array)
    return ops.to_rgb(Image.fromarray(array))


def _unknown(name: str, picture: Any) -> str:
    what = f"of type {type(picture).__name__}"
    if isinstance(picture, np.ndarray):
        what = f"an array {list(picture.shape)} of {picture.dtype}"
    return (
        f"{name} is {what}: give a path, the bytes of a file, a Pillow picture, or an array uint8 "
        "[h, w, 3], [h, w, 4] or [h, w]; normalised pixels with preprocessed=True."
    )

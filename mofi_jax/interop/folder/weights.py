"""The arrays of a folder: safetensors, or PyTorch's own files, each in one file or in many.

Nothing is read before its shape is known, and then an array at a time. A `pytorch_model.bin` is a
pickle, which can run anything: it is opened by PyTorch's loader of tensors alone, or not at all.
"""

import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors
from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput

WEIGHTS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model.bin"
INDEX = ".index.json"  # after either name, where the arrays lie in several files

# The types that weights come in, as safetensors and as PyTorch spell them.
DTYPES = ("F16", "BF16", "F32", "F64", "float16", "bfloat16", "float32", "float64")
# Before it, files can get round `weights_only` (CVE-2025-32434).
SAFE_TORCH = (2, 6)
COPY_AGAIN = "copy the whole folder again"
BLOCK = 64 << 20  # bytes of an array that are written at a time


class Stored(NamedTuple):
    """An array of a file that is not read yet."""

    shape: tuple[int, ...]
    dtype: str
    path: epath.Path
    read: Callable[[], np.ndarray]


class Arrays(Mapping):
    """The arrays of files by name, float32, each read when asked for; BadInput if damaged."""

    def __init__(self, stored: Mapping[str, Stored]):
        self._stored = stored

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self._stored.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._stored[name]
        try:
            # bfloat16 is a numpy type here because ml_dtypes (with jax) registers it.
            return array.read().astype(np.float32)
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise _unreadable(array.path, error) from error

    def with_array(self, name: str, array: np.ndarray) -> "Arrays":
        """The same with one more, or another in its place."""
        more = Stored(array.shape, "float32", epath.Path(), lambda: array)
        return Arrays({**self._stored, name: more})

    def below(self, prefix: str) -> "Arrays":
        """The same with a prefix before all names that lack it: a part saved as a whole model."""
        return Arrays(
            {prefix + name.removeprefix(prefix): array for name, array in self._stored.items()}
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def open_folder(folder: epath.PathLike) -> Arrays:
    """The weights of a model, found as transformers finds them; raises BadInput as `open_files`."""
    folder = epath.Path(folder)
    for name in (WEIGHTS, TORCH_WEIGHTS):
        if (folder / name).exists():
            return open_files([folder / name])
        if (folder / (name + INDEX)).exists():
            return open_files(_shards(folder / (name + INDEX)))
    raise BadInput(
        f"{folder} has no weights ({WEIGHTS}, {TORCH_WEIGHTS}, or either in parts with its "
        f"{INDEX}): {COPY_AGAIN}."
    )


def open_files(paths: Sequence[epath.Path]) -> Arrays:
    """All arrays of safetensors files, or of PyTorch's where the name ends in .bin.

    Raises BadInput: a file that is missing, damaged or more than tensors, .bin without PyTorch, or
    an array whose type is not of `DTYPES`.
    """
    stored: dict[str, Stored] = {}
    for path in paths:
        stored |= (_torch if path.suffix == ".bin" else _safetensors)(path)
    for name, array in stored.items():
        # Position ids are whole numbers, and buffers of old transformers rather than weights.
        if array.dtype not in DTYPES and not name.endswith(".position_ids"):
            raise BadInput(
                f"{array.path} holds {name} as {array.dtype}, which is no type of weights: save "
                "the model as float32, float16 or bfloat16."
            )
    return Arrays(stored)


class Rows(NamedTuple):
    """An array that is written as its rows come."""

    shape: tuple[int, ...]
    blocks: Iterable[np.ndarray]  # which make it up along the first axis


@dataclasses.dataclass(frozen=True)
class Scattered:
    """An array whose rows are read when it is written, some at a time, in any order."""

    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]  # numbers of rows, and the rows


def save(path: epath.PathLike, arrays: Mapping[str, np.ndarray | Rows | Scattered]) -> None:
    """Writes a safetensors file of float32.

    The library's own writer holds a copy of all arrays; this one of `BLOCK` bytes, and takes views
    that are not contiguous as they are.
    """
    # transformers refuses a file that does not name its layout.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + 4 * math.prod(array.shape)
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            if isinstance(array, Scattered):
                _scatter(file, array)
                continue
            for block in array.blocks if isinstance(array, Rows) else [array]:
                # A scalar has no rows.
                block = block.reshape(block.shape or (1,))
                rows = max(1, BLOCK // max(1, 4 * math.prod(block.shape[1:])))
                for i in range(0, len(block), rows):
                    file.write(np.ascontiguousarray(block[i : i + rows], "<f4").data)
        if file.tell() != 8 + len(text) + end:
            raise ValueError(f"{path} has other rows than its arrays should have")


def _scatter(file: BinaryIO, array: Scattered) -> None:
    start, width = file.tell(), 4 * math.prod(array.shape[1:])
    file.flush()
    for numbers, rows in array.blocks():
        for number, row in zip(numbers.tolist(), np.asarray(rows, "<f4"), strict=True):
            os.pwrite(file.fileno(), row.data, start + number * width)
    file.seek(start + array.shape[0] * width)


def read_rows(path: epath.PathLike, name: str) -> Scattered:
    """An array of a safetensors file that was opened before, as it is written again."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))[name]
    if header["dtype"] != "F32":
        array = open_files([epath.Path(path)])[name]
        return Scattered(array.shape, lambda: [(np.arange(len(array)), array)])
    shape = tuple(header["shape"])
    width, start = math.prod(shape[1:]), 8 + length + header["data_offsets"][0]
    size = max(1, BLOCK // max(1, 4 * width))

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, shape[0], size):
            numbers = np.arange(first, min(first + size, shape[0]))
            offset, count = start + 4 * width * first, width * len(numbers)
            rows = np.fromfile(path, "<f4", count, offset=offset)
            yield numbers, rows.reshape(len(numbers), *shape[1:])

    return Scattered(shape, blocks)


def _shards(index: epath.Path) -> list[epath.Path]:
    place = files.read_json_object(index, COPY_AGAIN).get("weight_map")
    names = set(place.values()) if isinstance(place, dict) else {None}
    # A name is that of a file beside the index, and of nothing else on this machine.
    if not all(isinstance(name, str) and name == epath.Path(name).name for name in names):
        raise BadInput(f"{index} has no weight_map from arrays to files beside it: {COPY_AGAIN}.")
    return [index.parent / name for name in sorted(names)]


def _safetensors(path: epath.Path) -> dict[str, Stored]:
    try:
        file = safetensors.safe_open(path, "np")
        names = file.keys()
        parts = {name: file.get_slice(name) for name in names}
        return {
            name: Stored(tuple(part.get_shape()), part.get_dtype(), path, _reader(file, name))
            for name, part in parts.items()
        }
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error


def _reader(file: Any, name: str) -> Callable[[], np.ndarray]:
    return lambda: file.get_tensor(name)


def _torch(path: epath.Path) -> dict[str, Stored]:
    if importlib.util.find_spec("torch") is None:
        raise BadInput(
            f"{path} is a file of PyTorch, which is not installed: pip install torch, or save the "
            f"model as {WEIGHTS}."
        )
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise BadInput(
            f"{path} is a pickle, which PyTorch {torch.__version__} does not open safely: pip "
            f"install 'torch>={'.'.join(map(str, SAFE_TORCH))}', or save the model as {WEIGHTS}."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can make its reader raise anything
        raise BadInput(
            f"{path} is damaged, or a pickle of more than tensors, which could run anything and "
            f"is not opened ({type(error).__name__}): get the model as {WEIGHTS}."
        ) from error
    kind = torch.Tensor
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, kind) for name, value in state.items()
    ):
        raise BadInput(f"{path} is no state dict of tensors by name: get the model as {WEIGHTS}.")
    return {
        name: Stored(
            tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), path, _numpy(tensor)
        )
        for name, tensor in state.items()
    }


def _numpy(tensor: Any) -> Callable[[], np.ndarray]:
    # numpy has no bfloat16 that PyTorch knows of.
    return lambda: tensor.detach().float().numpy()


def _unreadable(path: epath.Path, error: Exception) -> BadInput:
    return BadInput(f"The weights {path} cannot be read ({error}): copy the file again.")

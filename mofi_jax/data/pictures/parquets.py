"""Pictures in Hugging Face's parquet and Arrow files, or img2dataset's: a column of pictures.

It is ``struct<bytes, path>``, or of bytes under a name that says so.

A row group is the smallest piece that parquet reads, so that reading picture by picture in another
order than that of the file would unpack a hundred pictures for each.
"""

import bisect
import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.data.pictures import arrow_files

PICTURES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "image_bytes")
_GROUP_BYTES = 1 << 30  # as they lie unpacked in memory
_KEPT_BYTES = 1 << 30  # of those used last: each device's part of a batch lies in another one


class Rows:
    """Row groups of several files as one table, of which the last few used are kept."""

    def __init__(self, paths: Sequence[epath.Path]):
        self.paths = paths
        self._files = [open_file(path) for path in paths]
        self.schema = self._files[0].schema_arrow
        self._groups, lengths = [], []
        for file, path in zip(self._files, paths, strict=True):
            if file.schema_arrow != self.schema:
                raise BadInput(f"{path} has other columns than {paths[0]}: fetch both again.")
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                if facts.total_byte_size > _GROUP_BYTES:
                    raise BadInput(
                        f"A row group of {path} takes {facts.total_byte_size >> 20} MiB, which is "
                        "too much to read pictures one by one: write it anew with row groups "
                        "of some hundred pictures."
                    )
                self._groups.append((file, group, path))
                lengths.append(facts.num_rows)
        self._ends = list(itertools.accumulate(lengths))
        self._lock = threading.Lock()
        self._kept: dict[int, Any] = {}  # unpacked groups, that used last at the end
        self.picture = pick(
            *(paths[0], self.schema.names, picture_columns(self.schema), PICTURES, "pictures")
        )
        kind = self.schema.field(self.picture).type
        self.has_paths = _member(kind, "path") >= 0
        self._leaf = f"{self.picture}.bytes" if _member(kind, "bytes") >= 0 else self.picture

    def column(self, name: str) -> list[Any]:
        """All values of a column or ``struct.member``; read without the pictures."""
        top, _, member = name.partition(".")
        values = []
        for file, path in zip(self._files, self.paths, strict=True):
            with _damage_told(path):
                column = file.read(columns=[name]).column(top)
            cells = column.to_pylist()
            values += [cell and cell[member] for cell in cells] if member else cells
        return values

    def picture_bytes(self, i: int) -> bytes:
        """The file of a row's picture; BadInput where there is none, or the rows are damaged."""
        data = self.bytes_or_none(i)
        if data is None:
            raise BadInput(f"Row {i} of {self.paths[0]} has no picture in it: fetch it again.")
        return data

    def bytes_or_none(self, i: int) -> bytes | None:
        number = bisect.bisect_right(self._ends, i)
        with self._lock:  # a group is read once, by the first thread that asks for it
            group = self._kept.pop(number, None)
            group = self._read_group(number) if group is None else group
            self._kept[number] = group
            while len(self._kept) > 1 and sum(g.nbytes for g in self._kept.values()) > _KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
        return group[i - self._ends[number]].as_py()  # counted from the end of the group

    def _read_group(self, number: int) -> Any:
        from pyarrow import compute

        file, group, path = self._groups[number]
        with _damage_told(path):
            column = file.read_row_group(group, columns=[self._leaf]).column(self.picture)
        if self._leaf != self.picture:
            column = compute.struct_field(column, "bytes")
        return column.combine_chunks()


def open_file(path: epath.Path) -> Any:
    """`pyarrow.parquet.ParquetFile`, or what of an Arrow file is like it; BadInput where none."""
    import pyarrow.parquet as pq

    with _damage_told(path):
        is_arrow = path.suffix == arrow_files.SUFFIX
        return arrow_files.ArrowFile(path) if is_arrow else pq.ParquetFile(str(path))


@contextlib.contextmanager
def _damage_told(path: epath.Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        kind = "Arrow" if path.suffix == arrow_files.SUFFIX else "parquet"
        raise BadInput(f"{path} cannot be read as {kind} ({error}): fetch it again.") from error


def picture_columns(schema: Any) -> list[str]:
    """Columns of a pyarrow schema that hold pictures."""
    import pyarrow as pa

    def is_bytes(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def holds(field: pa.Field) -> bool:
        at = _member(field.type, "bytes")
        inner = is_bytes(field.type.field(at).type) if at >= 0 else False
        return inner or (is_bytes(field.type) and field.name in PICTURES)

    return [field.name for field in schema if holds(field)]


def _member(kind: Any, name: str) -> int:
    """Where in a struct it is; -1 for what has none of this name."""
    import pyarrow as pa

    return kind.get_field_index(name) if pa.types.is_struct(kind) else -1


def pick(
    path: epath.Path, names: Sequence[str], fitting: Sequence[str], known: Sequence[str], what: str
) -> str:
    """The first of the `known` names that fits, or the only one that does; else BadInput."""
    found = [name for name in known if name in fitting] or list(fitting)
    if not found or (len(found) > 1 and found[0] not in known):
        raise BadInput(
            f"{path} has no column of {what} that is known by its name (columns: "
            f"{', '.join(names)}): call it one of {', '.join(known)}."
        )
    return found[0]

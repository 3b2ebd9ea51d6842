"""Pictures in Hugging Face's parquet: a column of ``struct<bytes, path>``.

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

PICTURES = ("image", "img", "jpg", "picture", "photo")
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
        self.has_paths = self.schema.field(self.picture).type.get_field_index("path") >= 0

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
        number = bisect.bisect_right(self._ends, i)
        with self._lock:  # a group is read once, by the first thread that asks for it
            group = self._kept.pop(number, None)
            group = self._read_group(number) if group is None else group
            self._kept[number] = group
            while len(self._kept) > 1 and sum(g.nbytes for g in self._kept.values()) > _KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
        data = group[i - self._ends[number]].as_py()  # counted from the end of the group
        if data is None:
            raise BadInput(f"Row {i} of {self.paths[0]} has no picture in it: fetch it again.")
        return data

    def _read_group(self, number: int) -> Any:
        from pyarrow import compute

        file, group, path = self._groups[number]
        with _damage_told(path):
            table = file.read_row_group(group, columns=[f"{self.picture}.bytes"])
        return compute.struct_field(table.column(self.picture), "bytes").combine_chunks()


def open_file(path: epath.Path) -> Any:
    """`pyarrow.parquet.ParquetFile`; raises BadInput where it is none."""
    import pyarrow.parquet as pq

    with _damage_told(path):
        return pq.ParquetFile(str(path))


@contextlib.contextmanager
def _damage_told(path: epath.Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path} cannot be read as parquet ({error}): fetch it again.") from error


def picture_columns(schema: Any) -> list[str]:
    """Columns of a pyarrow schema that hold pictures."""
    import pyarrow as pa

    def holds(kind: pa.DataType) -> bool:
        at = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
        return at >= 0 and (
            pa.types.is_binary(kind.field(at).type) or pa.types.is_large_binary(kind.field(at).type)
        )

    return [field.name for field in schema if holds(field.type)]


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

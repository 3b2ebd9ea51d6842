"""Hugging Face-style parquet: the pictures' bytes and their captions in columns of one file.

The picture is a column `struct<bytes, path>`, as the library `datasets` writes it, or of plain
bytes. Row groups are the smallest piece that parquet reads, so that one is never split between two
shards; within it rows are streamed. For the same reason pictures cannot be fetched from here one by
one: the samples come without a pointer, and `sources` unpacks their pictures.
"""

import contextlib
from collections.abc import Iterator, Sequence

from data_prep.pairs import pictures, samples
from data_prep.pairs.samples import Sample
from mofi_jax.common import errors

PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "image_bytes")
_BATCH = 32  # rows; pictures of a few megabytes each should not fill the memory


def scan(path: str, rows: int) -> dict:
    """The columns, and the row groups of each piece of at least `rows` rows, from the footer alone.

    Returns:
      `image` (the column of bytes), `text`, `columns` and `ranges`: for each piece its first row,
      first row group and the row group after its last.

    Raises:
      BadInput: unreadable, or without the columns needed.
    """
    with _open(path) as file:
        schema, groups = file.schema_arrow, file.metadata.num_row_groups
        lengths = [file.metadata.row_group(i).num_rows for i in range(groups)]
    found = _detect(path, schema)
    ranges, first, group, row = [], 0, 0, 0
    for i, length in enumerate(lengths):
        row += length
        if row - first >= rows or i + 1 == groups:
            if row > first:
                ranges.append([first, group, i + 1])
            first, group = row, i + 1
    return {**found, "columns": schema.names, "ranges": ranges}


def read(
    inputs: Sequence[str], part: dict, keep: Sequence[str], counts: dict[str, int]
) -> Iterator[Sample]:
    """The samples of one piece of a file.

    Args:
      inputs: the file.
      part: what `scan` returned, with `range` instead of `ranges`, and `stem`, with which the keys
        begin where no column holds them.
      keep: further columns to read.
      counts: `members` is counted up.
    """
    path, (first, start, stop) = inputs[0], part["range"]
    names = part["columns"]
    key_column = samples.pick(names, samples.KEY_COLUMNS)
    url_column = samples.pick(names, samples.URL_COLUMNS)
    wanted = {part["text"], key_column, url_column, *keep} & set(names)
    with _open(path) as file, _told(path):
        batches = file.iter_batches(
            _BATCH, row_groups=range(start, stop), columns=[part["image"], *sorted(wanted)]
        )
        number = first
        for batch in batches:
            blobs = _blobs(batch, part["image"])
            others = batch.select(sorted(wanted)).to_pylist()
            for blob, row in zip(blobs, others, strict=True):
                counts["members"] += 1
                key, url = row.get(key_column), row.get(url_column)
                key = str(key) if key not in (None, "") else f"{part['stem']}/{number:08d}"
                if not blob.is_valid:
                    yield Sample(key, reason="picture_missing")
                elif blob.as_buffer().size > pictures.MAX_BYTES:
                    yield Sample(key, reason="too_many_bytes")
                else:
                    data = blob.as_py()
                    url = url if isinstance(url, str) and url else None
                    text = row[part["text"]]
                    yield Sample(key, text, data, None, 0, len(data), url, row)
                number += 1


def _detect(path: str, schema) -> dict[str, str]:
    import pyarrow as pa

    binary = (pa.types.is_binary, pa.types.is_large_binary)
    string = (pa.types.is_string, pa.types.is_large_string)

    def holds(kind: pa.DataType, tests) -> bool:
        return any(test(kind) for test in tests)

    leaves = {}
    for field in schema:
        if pa.types.is_struct(field.type):
            inner = field.type.get_field_index("bytes")
            if inner >= 0 and holds(field.type.field(inner).type, binary):
                leaves[field.name] = f"{field.name}.bytes"
        elif holds(field.type, binary):
            leaves[field.name] = field.name
    texts = [field.name for field in schema if holds(field.type, string)]
    picture = samples.pick(leaves, PICTURE_COLUMNS)
    if picture is None and len(leaves) == 1:
        [picture] = leaves  # under whatever name, there is no other that it could be
    text = samples.pick(texts, samples.TEXT_COLUMNS)
    if picture is None or text is None:
        listed = ", ".join(f"{field.name} ({field.type})" for field in list(schema)[:30])
        what, wanted = (
            ("pictures (bytes, or a struct with bytes)", PICTURE_COLUMNS)
            if picture is None
            else ("captions (strings)", samples.TEXT_COLUMNS)
        )
        raise errors.BadInput(
            f"sources: {path} has no column of {what} that is known by its name (columns found:"
            f" {listed}): rename it to one of {', '.join(wanted)}."
        )
    return {"image": leaves[picture], "text": text}


def _blobs(batch, column: str):
    """The array of bytes in a column, or in the struct of which it is a part."""
    import pyarrow.compute as pc

    if column in batch.schema.names:
        return batch.column(column)
    return pc.struct_field(batch.column(column.removesuffix(".bytes")), "bytes")


def _open(path: str):
    """A `pyarrow.parquet.ParquetFile` that streams: of a column no more than a buffer is held."""
    import pyarrow.parquet as pq

    with _told(path):
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """Turns what pyarrow says of a damaged file into BadInput."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise  # the disk or the network: the file may be sound
        reason = str(error).partition("\n")[0].rstrip(".")
        raise errors.BadInput(
            f"sources: {path} cannot be read as parquet ({reason}): fetch it again or remove it."
        ) from error

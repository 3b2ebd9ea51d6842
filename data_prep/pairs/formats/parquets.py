"""Hugging Face-style parquet and Arrow: pictures' bytes and captions in columns of one file.

The picture is a column `struct<bytes, path>`, as the library `datasets` writes it, or of plain
bytes; a caption a string or its bytes, or the first that is not empty in a list of such; either in
any of Arrow's encodings. Where no column holds pictures, one of paths names their files as in
other tables (`formats.tables`). Row groups are the smallest piece that parquet reads, so that one
is never split between two shards; within it rows are streamed. For the same reason pictures cannot
be fetched from here one by one: the samples come without a pointer, and `sources` unpacks their
pictures. Rows that img2dataset could not download are counted and are no samples.
"""

import collections
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence

from data_prep.pairs import pictures, samples
from data_prep.pairs.formats import tables
from data_prep.pairs.samples import Rejected, Sample
from mofi_jax.common import errors
from mofi_jax.data.pictures import arrow_files
from mofi_jax.data.pictures.parquets import PICTURES as PICTURE_COLUMNS

_BATCH = 32  # rows; pictures of a few megabytes each should not fill the memory
_LARGE = 256 << 20  # bytes of a column in a row group, below which nothing is suspected
_WIDEST = samples.MAX_TEXT  # bytes of a cell of fixed width
_MOST_PACKED = 10  # times smaller than it was; pictures are packed already


def scan(path: str, rows: int, texts: Sequence[str | None] = samples.TEXT_COLUMNS) -> dict:
    """The columns, and the row groups of each piece of at least `rows` rows, from the footer alone.

    Args:
      path: the file.
      rows: of a piece, at least.
      texts: what the column of captions may be called, the likeliest first; None: there need not
        be one.

    Returns:
      `image` (the column of bytes, or with `beside` of paths), `text`, `columns` and `ranges`: for
      each piece its first row, first row group and the row group after its last.

    Raises:
      BadInput: unreadable, without the columns needed, or larger unpacked than such files are.
    """
    with open_file(path) as file:
        schema, groups = narrow_columns(file), file.metadata.num_row_groups
        lengths = [file.metadata.row_group(i).num_rows for i in range(groups)]
        found = _detect(path, schema, texts)
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
      part: what `scan` returned, with `range` instead of `ranges`, `stem`, with which the keys
        begin where no column holds them, and `table`, from whose folder paths start.
      keep: further columns to read, or parts of them (see `samples.at`).
      counts: `members` and `not_downloaded` are counted up.
    """
    import pyarrow as pa

    path, (first, start, stop) = inputs[0], part["range"]
    names = part["columns"]
    named = (samples.pick(names, some) for some in (samples.KEY_COLUMNS, samples.URL_COLUMNS))
    wanted = samples.columns_of((*filter(None, (part["text"], *named)), "status", *keep), names)
    beside = tables.folders_of(part["table"]) if part.get("beside") else None
    with open_file(path) as file, told(path):
        leaves = [part["image"], *_leaves(file.schema_arrow, wanted, keep)]
        batches = file.iter_batches(_BATCH, row_groups=range(start, stop), columns=leaves)
        number = first
        for batch in batches:
            blobs = _cast(_leaf(batch, part["image"]))
            texts = _cast(batch.column(part["text"])) if part["text"] else pa.nulls(len(blobs))
            others = [(name, batch.column(name)) for name in sorted(wanted & {*batch.schema.names})]
            for i, (blob, text) in enumerate(zip(blobs, texts, strict=True)):
                counts["members"] += 1
                row = {name: samples.cell(column, i) for name, column in others}
                key, url = samples.key_and_url(row, f"{part['stem']}/{number:08d}")
                text = samples.first_text(text.as_py())  # bytes, not taken for UTF-8 yet
                if beside:
                    name = samples.text_of(blob.as_py())
                    try:
                        found, data = tables.fetch(name, *beside)
                    except Rejected as rejected:
                        yield Sample(key, reason=str(rejected))
                    else:
                        yield Sample(key, text, data, found, 0, len(data), url, row)
                elif not blob.is_valid and row.get("status") in samples.FAILED:
                    counts["not_downloaded"] = counts.get("not_downloaded", 0) + 1
                elif not blob.is_valid:
                    yield Sample(key, reason="picture_missing")
                elif (
                    blob.as_buffer().size > pictures.MAX_BYTES
                    or len(text or b"") > samples.MAX_TEXT
                ):
                    yield Sample(key, reason="too_many_bytes")
                else:
                    data = blob.as_py()
                    yield Sample(key, text, data, None, 0, len(data), url, row)
                number += 1


def _leaves(schema, columns: Iterable[str], keep: Sequence[str]) -> list[str]:
    """What has to be read of columns: of a struct the kept members alone, where none keeps it."""
    import pyarrow as pa

    found = []
    for name in sorted(columns):
        members = [path for path in keep if path.startswith(f"{name}.")]
        whole = name in keep or not pa.types.is_struct(schema.field(name).type)
        found += [name] if whole or not members else members
    return found


def _detect(path: str, schema, texts: Sequence[str]) -> dict[str, str | bool | None]:
    import pyarrow as pa

    kinds = pa.types
    binary = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view)
    string = (kinds.is_string, kinds.is_large_string, kinds.is_string_view)
    lists = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list)

    def holds(kind: pa.DataType, tests) -> bool:
        kind = kind.value_type if kinds.is_dictionary(kind) else kind
        return any(test(kind) for test in tests)

    leaves, strings, others = {}, [], []
    for field in schema:
        inner = field.type.value_type if holds(field.type, lists) else field.type
        if holds(inner, (*string, *binary)):
            (strings if holds(field.type, string) else others).append(field.name)
        if kinds.is_struct(field.type):
            at = field.type.get_field_index("bytes")
            if at >= 0 and holds(field.type.field(at).type, binary):
                leaves[field.name] = f"{field.name}.bytes"
        elif holds(field.type, binary):
            leaves[field.name] = field.name
    text = samples.pick(strings, texts) or samples.pick(others, texts)
    leaves.pop(text, None)
    picture = samples.pick(leaves, PICTURE_COLUMNS)
    if picture is None and len(leaves) == 1:
        [picture] = leaves  # under whatever name, there is no other that it could be
    files = samples.pick(strings, tables.PATH_COLUMNS)
    if picture is None and files is not None and text is not None:
        return {"image": files, "text": text, "beside": True}
    if picture is None or (text is None and None not in texts):
        shown = (samples.spell_key(f"{field.name} ({field.type})") for field in list(schema)[:30])
        listed = ", ".join(words[:200] for words in shown)
        what, wanted = (
            ("pictures (bytes, or a struct with bytes)", PICTURE_COLUMNS)
            if picture is None
            else ("captions (strings)", texts)
        )
        named = ", or name it in config.caption_column" * (wanted is texts)
        how = f"rename it to one of {', '.join(wanted)}{named}"
        if picture is None and samples.pick(schema.names, samples.URL_COLUMNS):
            how = "where it lists addresses, name the folder to which img2dataset downloaded them"
        elif picture is not None and any(kinds.is_integer(field.type) for field in schema):
            how += "; or, where it has classes, pack them with `mofi class-folders`"
        raise errors.BadInput(
            f"sources: {path} has no column of {what} that is known by its name (columns found:"
            f" {listed}): {how}."
        )
    return {"image": leaves[picture], "text": text, "beside": False}


def _check_sizes(path: str, footer) -> None:
    """Raises BadInput where columns share a name, or where a cell may fill the memory."""
    names = [footer.schema.column(i).path for i in range(footer.num_columns)]
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise errors.BadInput(
                f"sources: {path} has {count} columns of the name {name!r}: rename all but one."
            )
    # Of row groups, not of columns: pyarrow ends the process where those of a footer are damaged.
    on_disk = os.path.getsize(path)
    for group in (footer.row_group(i) for i in range(footer.num_row_groups)):
        size = group.total_byte_size
        packed = size > max(_LARGE, _MOST_PACKED * on_disk)
        if packed or size > max(_LARGE, pictures.MAX_BYTES * group.num_rows):
            raise errors.BadInput(
                f"sources: {path} has {size:,} bytes in {group.num_rows:,} rows, which no pictures"
                " and captions have: drop the column that has them, or write the file again."
            )


def _leaf(batch, column: str):
    """The array of bytes in a column, or in the struct of which it is a part."""
    import pyarrow.compute as pc

    if column in batch.schema.names:
        return batch.column(column)
    return pc.struct_field(batch.column(column.removesuffix(".bytes")), "bytes")


def _cast(column):
    """An array of strings, bytes or lists of such, however encoded, as large_binary or lists."""
    import pyarrow as pa

    kind = pa.large_binary()
    if pa.types.is_nested(column.type):
        kind = pa.large_list(kind)
    return column.cast(kind)


def open_file(path: str):
    """A `pyarrow.parquet.ParquetFile`, or what is like it for Arrow.

    A column of one row group is held, at most `_LARGE`. Of a larger file it is no more than a
    buffer; such a stream believes what a page says of its size, which costs gigabytes where it
    lies.

    Raises:
      BadInput: unreadable, columns of one name, or larger unpacked than such files are.
    """
    import pyarrow.parquet as pq

    with told(path):
        if str(path).endswith(arrow_files.SUFFIX):
            return arrow_files.ArrowFile(path)
        buffer_size = 1 << 20 if os.path.getsize(path) > _LARGE else 0
        file = pq.ParquetFile(path, buffer_size=buffer_size, pre_buffer=False)
        _check_sizes(path, file.metadata)
    return file


def narrow_columns(file):
    """The schema without columns of a fixed width that fills the memory, with nulls as well.

    A file of a few bytes can have them.
    """
    import pyarrow as pa

    def width(kind: pa.DataType) -> int:
        kind = getattr(kind, "storage_type", kind)  # of an extension
        if pa.types.is_fixed_size_binary(kind):
            return kind.byte_width
        each = sum(width(kind.field(i).type) for i in range(kind.num_fields))
        return kind.list_size * max(8, each) if pa.types.is_fixed_size_list(kind) else each

    return pa.schema([field for field in file.schema_arrow if width(field.type) <= _WIDEST])


@contextlib.contextmanager
def told(path: str) -> Iterator[None]:
    """Turns what pyarrow says of a damaged file into BadInput."""
    import pyarrow as pa

    try:
        yield
    except errors.BadInput:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if getattr(error, "errno", None):
            raise  # the disk or the network: the file may be sound
        reason = str(error).partition("\n")[0].rstrip(".")
        kind = "Arrow" if str(path).endswith(arrow_files.SUFFIX) else "parquet"
        raise errors.BadInput(
            f"sources: {path} cannot be read as {kind} ({reason}): fetch it again or remove it."
        ) from error

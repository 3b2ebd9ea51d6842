"""A folder of embeddings: what it holds when it is finished, and how it gets there.

    embeddings.npy        float32 [n, d], L2-normalised, to be memory-mapped
    pictures.parquet      a row each: key, container and where in it (offset and length, or row),
                          width, height, sha256, entities (qid, name, score) if asked
    undecodable.parquet   pictures without an embedding: key, place, reason
    result.json           the model, counts, seconds, versions; written last

On the way ``parts/`` has the listing of all pictures, cut into pieces, and a file for each piece
that is done.  A piece is always embedded in the same batches, and so in the same bytes.
"""

import contextlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Float32

from mofi_jax.common import files
from mofi_jax.data.pictures.containers import Place

VECTORS, PICTURES, UNDECODABLE = "embeddings.npy", "pictures.parquet", "undecodable.parquet"
RESULT = "result.json"
PARTS = "parts"
_LISTING = "listing.parquet"
_PIECE = 2048  # pictures, rounded up to whole batches
_PLACE = pa.schema(
    [
        *(pa.field("key", pa.string()), pa.field("container", pa.string())),
        *(pa.field(name, pa.int64()) for name in ("offset", "length", "row")),
        pa.field("reason", pa.string()),
    ]
)
_LOOK = pa.schema(
    [
        *(pa.field("width", pa.int32()), pa.field("height", pa.int32())),
        pa.field("sha256", pa.string()),
    ]
)
_ENTITY = pa.struct({"qid": pa.string(), "name": pa.string(), "score": pa.float32()})


class Picture(NamedTuple):
    """What is known of a picture once it was looked at."""

    place: Place  # with a reason if it has no embedding
    width: int | None = None  # upright
    height: int | None = None
    sha256: str | None = None  # of its file


def write_listing(folder: epath.Path, places: Iterable, batch: int, facts: Mapping) -> int:
    """Cuts pictures into pieces of whole batches; returns how many pictures there are.

    `facts` is kept beside them, as it is when all are listed.
    """
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    size = -(-_PIECE // batch) * batch
    with appears(folder / PARTS, _LISTING) as path, pq.ParquetWriter(path, _PLACE) as writer:
        places, number = iter(places), 0
        while piece := [*itertools.islice(places, size)]:
            writer.write_table(_table(piece, _PLACE), row_group_size=size)
            number += len(piece)
        writer.add_key_value_metadata({"facts": json.dumps(facts)})
    return number


def is_listed(folder: epath.Path) -> bool:
    return (folder / PARTS / _LISTING).exists()


class Pieces:
    """The pieces of a listing, and what is done of them."""

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._listing = pq.ParquetFile(str(folder / PARTS / _LISTING))
        self.facts = json.loads(self._listing.metadata.metadata[b"facts"])
        self.pictures = self._listing.metadata.num_rows

    def missing(self) -> list[int]:
        """Numbers of the pieces that are not done."""
        there = {entry.name for entry in os.scandir(self._folder / PARTS)}
        return [i for i in range(len(self)) if _name(i) not in there]

    def __len__(self) -> int:
        return self._listing.num_row_groups

    def size(self, piece: int) -> int:
        return self._listing.metadata.row_group(piece).num_rows

    def places(self, piece: int) -> list[Place]:
        columns = self._listing.read_row_group(piece).to_pydict()
        return [Place(*row) for row in zip(*columns.values(), strict=True)]

    def write(
        self,
        piece: int,
        pictures: Sequence[Picture],
        vectors: Float32[np.ndarray, "n d"],
        entities: Sequence[Sequence[tuple[str, str, float]]] | None,
    ) -> None:
        """Keeps what a piece has become; the file appears complete or not at all."""
        table = _table([picture.place for picture in pictures], _PLACE)
        looks = _table([picture[1:] for picture in pictures], _LOOK)
        for name in _LOOK.names:
            table = table.append_column(name, looks[name])
        if entities is not None:
            values = [
                [dict(zip(("qid", "name", "score"), entity, strict=True)) for entity in of]
                for of in entities
            ]
            table = table.append_column("entities", pa.array(values, pa.list_(_ENTITY)))
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        of_pictures = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        table = table.append_column("embedding", of_pictures)
        with appears(self._folder / PARTS, _name(piece)) as path:
            pq.write_table(table, path, compression={"embedding": "none"}, use_dictionary=False)

    def assemble(self) -> dict[str, Any]:
        """Makes the finished files of all pieces; returns the counts for result.json.

        Call `finish` when result.json is written: until then it can be done again.
        """
        parts = [self._folder / PARTS / _name(i) for i in range(len(self))]
        reasons: dict[str, int] = {}
        for part in parts:
            counts = pc.value_counts(_read(part, ["reason"])["reason"]).to_pylist()
            for count in (c for c in counts if c["values"] is not None):
                reasons[count["values"]] = reasons.get(count["values"], 0) + count["counts"]
        schema = pq.read_schema(parts[0])
        dim = schema.field("embedding").type.list_size
        schema = schema.remove(schema.get_field_index("embedding"))
        good = schema.remove(schema.get_field_index("reason"))
        number = self.pictures - sum(reasons.values())
        scratch = self._folder / PARTS
        with (
            appears(scratch, UNDECODABLE, self._folder) as undecodable,
            appears(scratch, PICTURES, self._folder) as pictures,
            appears(scratch, VECTORS, self._folder) as vectors,
            pq.ParquetWriter(undecodable, _PLACE) as bad_rows,
            pq.ParquetWriter(pictures, good) as good_rows,
            open(vectors, "wb") as file,
        ):
            header = {"descr": "<f4", "fortran_order": False, "shape": (number, dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                table = _read(part)
                has = pc.is_null(table["reason"])
                found = table.filter(has)
                if len(found):
                    flat = found["embedding"].combine_chunks().flatten()
                    file.write(flat.to_numpy().astype("<f4", copy=False).tobytes())
                    good_rows.write_table(found.select(good.names))
                if len(found) < len(table):
                    bad_rows.write_table(table.filter(pc.invert(has)).select(_PLACE.names))
        return {
            "pictures": number,
            "dimension": dim,
            "undecodable": self.pictures - number,
            "reasons": dict(sorted(reasons.items())),
        }


def finish(folder: epath.Path) -> None:
    """Removes what only the making needs."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def discard(folder: epath.Path) -> None:
    """As if nothing had been embedded; what cannot be decoded stays named."""
    finish(folder)
    for name in (VECTORS, PICTURES):
        (folder / name).unlink(missing_ok=True)


def _name(piece: int) -> str:
    return f"{piece:06d}.parquet"


def _read(path: epath.Path, columns: list[str] | None = None) -> pa.Table:
    return pq.ParquetFile(str(path)).read(columns=columns)


def _table(rows: Sequence[tuple], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


@contextlib.contextmanager
def appears(scratch: epath.Path, name: str, folder: epath.Path | None = None) -> Iterator[str]:
    """A path to write to; the file then appears, whole, in `folder`, else in `scratch`."""
    path = os.fspath(scratch / f".{name}.{uuid.uuid4().hex}")
    try:
        yield path
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(path, (folder or scratch) / name)
    finally:
        with contextlib.suppress(OSError):  # moved, as a rule
            os.unlink(path)


def read_result(folder: epath.PathLike) -> dict[str, Any]:
    """result.json of a finished folder of embeddings.

    Raises BadInput: none there.
    """
    path = epath.Path(folder) / RESULT
    return files.read_json_object(path, "name a folder that `mofi embed` has written")

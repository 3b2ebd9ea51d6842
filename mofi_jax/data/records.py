"""THE example schema: what one record of a data set holds, how it is written and how it is read.

Records are `tf.train.Example` messages described by TFDS features, in ArrayRecord shards, so that
`tfds.data_source("i2e", data_dir=W)` opens them by name without TensorFlow.  Pixels are the matter
of `mofi_jax.data.ops`, batches that of `mofi_jax.data.pipeline`.

A data set is a folder `DATA_DIR/NAME/VERSION/` with

    NAME-SPLIT.array_record-NNNNN-of-NNNNN   records
    dataset_info.json  features.json         TFDS metadata: shard lengths, bytes, features
    tokenizer.json                           the tokenizer of its captions (`data.tokenizer`)
    entities.parquet                         the vocabulary, row = entity id (labelled sets only)
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mofi_jax.common import errors
from mofi_jax.data import limits, metadata

ENTITIES_FILE = "entities.parquet"
TOKENIZER_FILE = "tokenizer.json"
KEYS_FILE = "keys.parquet"  # key, shard, index: where a record is, for removing it
VERSION = "1.0.0"

# JPEG does not compress further, and one record per group is what makes random reads cheap.
WRITER_OPTIONS = "group_size:1,uncompressed"


@functools.cache
def features():
    """The TFDS features of a record (`tfds.features.FeaturesDict`).

    key: unique in the data set. image: RGB JPEG bytes. text: the caption. entity_ids int32[k]:
    rows of the vocabulary, empty in an unlabelled set. entity_scores float32[k]: the score of each
    label (cosine by CLIP, or the prior when chosen by text). source: where the pair came from.
    width, height: pixels of `image` as stored.
    """
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "key": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "text": tfds.features.Text(),
            "entity_ids": tfds.features.Sequence(np.int32),
            "entity_scores": tfds.features.Sequence(np.float32),
            "source": tfds.features.Text(),
            "width": np.int32,
            "height": np.int32,
        }
    )


@functools.cache
def _serializer():
    from tensorflow_datasets.core import example_serializer

    return example_serializer.ExampleSerializer(features().get_serialized_info())


def serialize(example: Mapping[str, Any]) -> bytes:
    """Encodes one example (the keys of `features`, image as JPEG bytes) as a `tf.train.Example`.

    Equal examples give equal bytes: protobuf leaves the order of map entries open unless asked.

    Raises ValueError: ids and scores of different length, or an image that is not JPEG bytes.
    """
    if len(example["entity_ids"]) != len(example["entity_scores"]):
        raise ValueError(f"record {example['key']!r} has unequal numbers of labels and scores")
    if not bytes(example["image"][:3]) == b"\xff\xd8\xff":
        raise ValueError(f"record {example['key']!r} holds an image that is not JPEG bytes")
    encoded = {
        **{name: example[name].encode() for name in ("key", "text", "source")},
        "image": example["image"],
        "entity_ids": np.asarray(example["entity_ids"], np.int32),
        "entity_scores": np.asarray(example["entity_scores"], np.float32),
        **{name: np.int32(example[name]) for name in ("width", "height")},
    }
    return _serializer().get_tf_example(encoded).SerializeToString(deterministic=True)


def parse(record: bytes) -> dict[str, Any]:
    """Decodes what `serialize` wrote: str, JPEG bytes, int32[k], float32[k] and int values.

    Reads the protobuf directly, eight times faster than TFDS's general parser, which also decodes
    pixels and returns lists.

    Raises ValueError: a field is missing.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    fields = tf_example_pb2.Example.FromString(record).features.feature
    ids, scores = fields["entity_ids"].int64_list.value, fields["entity_scores"].float_list.value
    try:
        return {
            "key": fields["key"].bytes_list.value[0].decode(),
            "image": fields["image"].bytes_list.value[0],
            "text": fields["text"].bytes_list.value[0].decode(),
            # np.array asks a protobuf field for each number several times.
            "entity_ids": np.fromiter(ids, np.int32, len(ids)),
            "entity_scores": np.fromiter(scores, np.float32, len(scores)),
            "source": fields["source"].bytes_list.value[0].decode(),
            "width": fields["width"].int64_list.value[0],
            "height": fields["height"].int64_list.value[0],
        }
    except IndexError:
        missing = features().keys() - {n for n in fields if fields[n].WhichOneof("kind")}
        raise ValueError(f"record lacks the fields {', '.join(sorted(missing))}") from None


def validate_entity_ids(ids: np.ndarray, num_entities: int, key: str) -> None:
    """Raises BadInput when a record's labels `ids` int[k] are not all in [0, num_entities)."""
    if len(ids) and (ids.min() < 0 or ids.max() >= num_entities):
        bad = int(ids.max() if ids.max() >= num_entities else ids.min())
        raise errors.BadInput(
            f"Record {key!r} carries entity id {bad}, beyond the vocabulary of {num_entities} "
            f"entities ({ENTITIES_FILE}); use the {ENTITIES_FILE} that was written with the shards."
        )


def shard_name(name: str, split: str, index: int, count: int) -> str:
    """File name of shard `index` of `count`, as TFDS expects it."""
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"


class Source:
    """Random access to the records of one split: `len(source)`, `source[i]` -> `parse`'s dict.

    Picklable, and safe to read from several threads; use `open_source` to make one.  `directory` is
    the folder of its version, `files` are the shards, `decode` takes records of another schema
    apart.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        directory: epath.Path,
        decode: Callable[[bytes], dict[str, Any]] = parse,
    ):
        # Imported before there are threads: two that import TFDS at once can deadlock.
        from array_record.python import array_record_module  # noqa: F401
        from tensorflow_datasets.proto import tf_example_pb2  # noqa: F401

        self._parts, self._decode = tuple(parts), decode
        # For each shard: the index of the record after its last, and that one's number in the file.
        self._ends = list(itertools.accumulate(part.take for part in parts))
        self._stops = [part.skip + part.take for part in parts]
        self._readers: dict[int, Any] = {}
        self.directory = directory
        self.files = [epath.Path(part.filename) for part in parts]

    def __reduce__(self):
        return Source, (self._parts, self.directory, self._decode)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):  # ends an iteration
            raise IndexError(f"record {index} of {len(self)}")
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Records, a run of them in one read; raises BadInput with the first that is damaged."""
        found: list[dict[str, Any]] = []
        for (shard, _), pairs in itertools.groupby(
            enumerate(indices), lambda pair: (self._shard(pair[1]), pair[1] - pair[0])
        ):
            run = [index for _, index in pairs]
            try:
                found += [self._decode(record) for record in self._read_run(shard, run)]
            except Exception as error:
                if errors.may_pass(error):
                    raise
                if len(run) > 1:  # one by one, to name the damaged record
                    found += [self[index] for index in run]
                    continue
                reason = str(error).strip().partition("\n")[0]
                raise errors.BadInput(
                    f"{self.place(run[0])} cannot be read ({reason}): the shard is damaged, copy "
                    "it again."
                ) from error
        return found

    def _read_run(self, shard: int, run: Sequence[int]) -> list[bytes]:
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._readers.setdefault(shard, open_shard(self.files[shard]))
        first = self._number(shard, run[0])
        return reader.read(first, first + len(run))

    def _shard(self, index: int) -> int:
        return bisect.bisect_right(self._ends, index)

    def _number(self, shard: int, index: int) -> int:  # in the file
        return self._stops[shard] - (self._ends[shard] - index)

    def place(self, index: int) -> str:
        """Where a record is, for people."""
        shard = self._shard(index)
        return f"Record {self._number(shard, index)} of {self.files[shard]}"


def open_source(data_dir: epath.PathLike, name: str, split: str = "train") -> Source:
    """Opens the newest version of a data set, `data_dir/name/version/`, as `open_directory` does.

    Raises BadInput: no such data set, and as `open_directory`.
    """
    return open_directory(metadata.find_directory(data_dir, name), split)


def open_directory(
    directory: epath.Path, split: str, decode: Callable[[bytes], dict[str, Any]] = parse
) -> Source:
    """Opens one version of a data set after checking every shard against the metadata.

    `split` may be a TFDS slice such as "train[:90%]"; `decode` is for records of another schema.

    Raises:
      BadInput: split or shard missing; shard cut short or damaged; remote path; more shards than
        files may be open.
    """
    parts = metadata.shard_parts(directory, split)
    limits.allow_open_files(len(parts))
    for part in parts:
        _check_shard(epath.Path(part.filename), part.examples_in_shard)
    return Source(parts, directory, decode)


def open_shard(path: epath.PathLike) -> Any:
    """An ArrayRecordReader for any number of threads; `read(first, stop)` reads the file once."""
    from array_record.python import array_record_module

    # Ranges are cut into reads of this size; nothing beyond a range is read.
    options = "readahead_buffer_size:1G,max_parallelism:0"
    return array_record_module.ArrayRecordReader(str(path), options, file_reader_buffer_size=32_768)


def _check_shard(path: epath.Path, length: int) -> None:
    """Raises BadInput unless the shard at `path` opens and holds `length` records.

    ArrayRecord's reader constructs on a truncated file, reports 0 records and raises nothing.
    """
    state = "is missing"
    if path.exists():
        reader = open_shard(path)
        state = "is cut short or damaged"
        if reader.ok():
            state = f"holds {reader.num_records()} records"
            reader.close()  # on a damaged file this would raise
        if state == f"holds {length} records":
            return
    raise errors.BadInput(
        f"Shard {path} {state}, where {metadata.INFO_FILE} promises {length} records; copy it "
        f"again, or delete {path.parent} and run `mofi labels` again."
    )


class Strings(Sequence[str]):
    """A column of a table as a list of strings; null is "". Millions take no Python strings."""

    def __init__(self, column: Any):  # pyarrow.ChunkedArray
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return list(self)[i]
        return self._column[range(len(self))[i]].as_py() or ""

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.chunks:
            yield from (value or "" for value in chunk.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclasses.dataclass(frozen=True)
class Entities:
    """The vocabulary of a labelled data set; row i is entity id i.

    qids: the knowledge base's identifiers. names, descriptions: English; a description may be "".
    counts int64[e]: images per entity; descending, until records are removed: ids then stay.
    """

    qids: Sequence[str]
    names: Sequence[str]
    descriptions: Sequence[str]
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.qids)

    def text(self, i: int, with_description: bool = False) -> str:
        """The entity in words: "name", or "name, description" (MOFI, section 3.2)."""
        if with_description and self.descriptions[i]:
            return f"{self.names[i]}, {self.descriptions[i]}"
        return self.names[i]


def write_entities(path: epath.PathLike, entities: Entities, old: Entities | None = None) -> None:
    """Writes entities.parquet: id int32, qid, name, description, image_count int64.

    Entities come by descending count, then by qid; or as in `old`, their earlier state.

    Raises ValueError: not in that order, or a qid occurs twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = list(zip((-entities.counts).tolist(), entities.qids, strict=True))
    if old is None and order != sorted(order):
        raise ValueError("entities must come by descending count, then by qid")
    if old is not None and entities.qids != old.qids:
        raise ValueError("entities must keep the ids they had")
    if len(set(entities.qids)) != len(entities):
        raise ValueError("a qid occurs twice in the vocabulary")
    table = pa.table(
        {
            "id": np.arange(len(entities), dtype=np.int32),
            "qid": pa.array(entities.qids, pa.string()),
            "name": pa.array(entities.names, pa.string()),
            "description": pa.array(entities.descriptions, pa.string()),
            "image_count": np.asarray(entities.counts, np.int64),
        }
    )
    pq.write_table(table, str(path), compression="zstd")


def read_entities(path: epath.PathLike) -> Entities:
    """Reads entities.parquet; raises BadInput if it is missing or ids are not 0, 1, 2, ..."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not epath.Path(path).exists():
        raise errors.BadInput(
            f"There is no vocabulary at {path}; a labelled data set carries {ENTITIES_FILE} beside "
            "its shards: copy it too."
        )
    whole, text = pa.int64(), pa.string()
    columns = {"id": whole, "qid": text, "name": text, "description": text, "image_count": whole}
    try:
        with epath.Path(path).open("rb") as file:
            table = pq.read_table(file, columns=list(columns)).cast(pa.schema(columns))
        if empty := [c for c in columns if c != "description" and table[c].null_count]:
            raise pa.ArrowInvalid(f"{empty[0]} is empty in some rows")
        ids, counts = (table[c].to_numpy() for c in ("id", "image_count"))
    except (pa.ArrowException, KeyError, OSError) as error:
        raise errors.BadInput(
            f"{path} is not a vocabulary with the columns {', '.join(columns)} "
            f"({str(error).partition(chr(10))[0]}); write it with `mofi labels`."
        ) from error
    if not np.array_equal(ids, np.arange(len(ids))):
        raise errors.BadInput(
            f"The ids of {path} are not its row numbers; write it with `mofi labels`."
        )
    return Entities(*(Strings(table[c]) for c in ("qid", "name", "description")), counts)

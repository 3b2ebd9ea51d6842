"""Tables and parquet with anything done to them: samples or one sentence, no traceback."""

import io
import json
import os
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from data_prep.pairs import samples
from data_prep.pairs.formats import parquets, tables
from mofi_jax.common import errors
from tests.fuzzing import fuzz, mutated

ROWS = [
    {"file_name": "0.png", "text": 'one, "two"', "key": "a", "NSFW": "0.5", "url": "http://h"},
    {"file_name": "./0.png", "text": "caf\u00e9", "key": "", "NSFW": "", "url": ""},
    {"file_name": "x\\0.png", "text": "lines\nof it", "key": "c", "NSFW": "no", "url": "u"},
]


def sound_parquet(**options):
    data = io.BytesIO()
    columns = {name: [row[name] for row in ROWS] for name in ("text", "key", "NSFW", "url")}
    columns["image"] = [{"bytes": b"picture" * 9, "path": None}, None, {"bytes": b"", "path": ""}]
    pq.write_table(pa.table(columns), data, row_group_size=2, **options)
    return data.getvalue()


def separated(mark):
    lines = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    return "".join(
        mark.join('"' + cell.replace('"', '""') + '"' for cell in line) + "\n" for line in lines
    ).encode()


SOUND = {
    "csv": [separated(","), separated(";")],
    "tsv": [separated("\t").replace(b'"', b"")],
    "jsonl": ["".join(json.dumps(row) + "\n" for row in ROWS).encode()],
    "parquet": [sound_parquet(), sound_parquet(compression="zstd", use_dictionary=False)],
}
# What means something to a reader.
TOKENS = [
    b'"',
    b"\n",
    b"\r",
    b",",
    b"\t",
    b"\0",
    b"\xff",
    b"\\",
    b"../",
    b"/dev/zero",
    b"{",
    b"[1]",
]
TOKENS += [
    b'"text": ["a"]',
    b"NaN",
    b"1e999",
    b"\\ud800",
    b"9" * 5_000,
    b"x" * 140_000,
    b"\n" * 200,
]


@pytest.mark.parametrize("kind", SOUND)
@fuzz(100, more=st.data(), rows=st.integers(1, 4))
def test_every_row_is_a_sample_or_a_reject(kind, more, rows):
    data = more.draw(mutated(SOUND[kind], TOKENS))
    reader = parquets if kind == "parquet" else tables
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"t.{kind}")
        for name, content in (("0.png", b"picture"), (f"t.{kind}", data)):
            with open(os.path.join(folder, name), "wb") as out:
                out.write(content)
        counts, found = {"members": 0}, []
        try:
            plan = json.loads(json.dumps(reader.scan(path, rows), ensure_ascii=False).encode())
            for piece in plan.pop("ranges"):
                part = {**plan, "range": piece, "table": path, "stem": "t"}
                found += reader.read((path,), part, ("NSFW", "text"), counts)
        except errors.BadInput as error:
            assert str(error).endswith((".", "]."))  # noqa: PT017  any of them is well
    assert len(found) <= counts["members"]
    for sample in found:
        assert len(samples.spell_key(sample.key).splitlines()) == 1
        samples.extras_json(sample.extras, ("NSFW", "text"))
        if sample.reason is None:
            assert len(sample.picture) == sample.length
            try:
                assert samples.caption(sample.text, 100)[0]
            except samples.Rejected as rejected:
                assert " " not in str(rejected)  # noqa: PT017


@fuzz(1, size=st.just(b"\xfe\xff\xff\xff\x0f"))
def test_a_page_that_claims_two_gigabytes_takes_none_of_them(size):
    data = sound_parquet(compression="zstd", use_dictionary=False)
    assert data[4:8:2] == b"\x15\x15"  # kind and size of the first page, then its packed size
    at = data.index(b"\x15", 8) + 1
    end = next(i for i in range(at, len(data)) if data[i] < 0x80) + 1
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0)
    stop = column.data_page_offset + column.total_compressed_size
    data = (data[:at] + size + data[end:stop])[:stop] + data[stop:]
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        file.write(data)
        file.flush()
        plan = parquets.scan(file.name, 4)
        part = {**plan, "range": plan["ranges"][0], "stem": "t"}
        with pytest.raises(errors.BadInput, match="Page was smaller"):
            list(parquets.read((file.name,), part, ("NSFW",), {"members": 0}))

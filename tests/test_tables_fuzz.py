"""Tables and parquet with anything done to them: samples or one sentence, no traceback.

FUZZ_EXAMPLES=100000 runs longer.
"""

import io
import json
import os
import tempfile

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from data_prep.pairs import samples
from data_prep.pairs.formats import parquets, tables
from mofi_jax.common import errors

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
fuzz = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=5_000,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
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


@st.composite
def mutated(draw):
    """The end of a name and a file with bytes changed, cut out, repeated or put in."""
    kind = draw(st.sampled_from(sorted(SOUND)))
    data = bytearray(draw(st.sampled_from(SOUND[kind])))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["token", "flip", "cut", "insert", "repeat"])):
            case "token":
                data[at:at] = draw(st.sampled_from(TOKENS))
            case "flip":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[at : at + draw(st.integers(1, 50))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=20))
            case "repeat":
                data[at:at] = data[at : at + 100] * draw(st.integers(1, 5))
    return kind, bytes(data)


@hypothesis.given(mutated(), st.integers(1, 4))
@fuzz
def test_every_row_is_a_sample_or_a_reject(file, rows):
    kind, data = file
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

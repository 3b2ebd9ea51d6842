"""Tars with anything done to them, captions of any kind: told or read, never a traceback."""

import gzip
import io
import json
import os
import tarfile
import tempfile
import tracemalloc

import pytest
from etils import epath
from hypothesis import strategies as st

from data_prep import engine
from data_prep.pairs import samples
from data_prep.pairs.formats import tars
from tests import fuzzing
from tests.fuzzing import fuzz, json_values

MOST = 32 << 20  # bytes of Python objects; the inputs have a few thousand


def sound_tar(kind):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=kind) as tar:
        for key in ("a", "é" * 60 + "/b", "c" * 120):
            for name, content in (("jpg", b"picture" * 99), ("txt", b"words"), ("json", b"{}")):
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


SOUND = [sound_tar(kind) for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
FIELDS = [(0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)]  # of a header


@st.composite
def mutated_tars(draw):
    """A tar with bytes changed, cut out or put in; the checksums of some headers made right."""
    data = bytearray(draw(st.sampled_from(SOUND)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(0, len(data) // 512 - 1))) * 512
        match draw(st.sampled_from(["field", "flip", "cut", "insert", "repeat", "zero"])):
            case "field":
                start, length = draw(st.sampled_from(FIELDS))
                odd = [b"\xff" * 12, b"\x80" * 12, b"-0000001000\0", b"L", b"x", b"g", b"S", b"1"]
                value = draw(st.sampled_from(odd) | st.binary(max_size=length))[:length]
                data[at + start : at + start + len(value)] = value
                if len(data) >= at + 512:
                    data[at + 148 : at + 156] = b" " * 8
                    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
            case "flip":
                place = at + draw(st.integers(0, 511))
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[at : at + draw(st.integers(1, 2_000))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=600))
            case "repeat":
                data[at:at] = data[at : at + 512] * draw(st.integers(1, 40))
            case "zero":
                data[at : at + 512] = bytes(512)
    return bytes(data)


def read(data, suffix=".tar"):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"0{suffix}")
        with open(path, "wb") as file:
            file.write(data)
        if suffix == ".tar.gz":
            outputs = engine.Outputs(epath.Path(folder), "unpacked", "0.tar")
            tars.unpack(engine.Task("0.tar", (path,)), outputs, {})
            path = os.fspath(outputs.path("unpacked/0.tar"))
        counts = {}
        found = list(tars.read((path,), {"name": path}, (), counts))
        listing = tars.list_members(path)
        plan, pieces, totals = tars.scan(path, 2, f"{path}.members"), [], {}
        for piece in plan.pop("ranges"):
            part = {"name": path, **plan, "range": piece}
            pieces += tars.read((path, f"{path}.members"), part, (), totals)
        assert (pieces, totals) == (found, counts)
    return found, counts, listing


@fuzz(300, data=mutated_tars(), suffix=st.sampled_from([".tar", ".tar.gz"]), more=st.data())
def test_every_name_in_a_tar_is_a_pair_or_a_reject(data, suffix, more):
    if suffix == ".tar.gz":
        packed = bytearray(gzip.compress(data, mtime=0))
        at = more.draw(st.integers(0, len(packed) - 1))
        packed[at] ^= more.draw(st.integers(0, 255))
        data = packed[: more.draw(st.integers(1, len(packed)))]
    tracemalloc.start()
    try:
        found, counts, listing = read(data, suffix)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    keys = [sample.key for sample in found]
    if listing is None:
        assert [sample.reason for sample in found] == ["not_a_tar"]
        return
    assert counts["members"] == len(listing.members)
    assert {key for key, _ in tars._group(listing.members)} <= set(keys)
    assert sum(sample.reason == "tar_damaged" for sample in found) == len(listing.damaged)
    for sample in found:
        # Without a text it is none later on, unless entities are given.
        assert sample.reason or len(sample.picture) == sample.length
        assert len(samples.spell_key(sample.key).splitlines()) <= 1


@fuzz(300, text=st.text() | st.binary() | st.from_regex(r"(&#?x?[0-9a-z]{1,6};?|[^a])*"))
def test_a_caption_is_one_line_or_a_reason(text):
    try:
        line, _ = samples.caption(text, 100)
    except samples.Rejected:
        return
    assert line == line.strip()
    assert line.encode().decode() == line
    assert line.splitlines() == [line]
    assert len(line) <= 100


@fuzz(300, values=st.dictionaries(st.sampled_from("abc"), json_values))
def test_what_is_kept_beside_a_pair_is_json(values):
    text = samples.extras_json(values, ("a", "b", "c"))
    if text is not None:
        text.encode()
        assert set(json.loads(text, parse_constant=int)) <= set(values)


@pytest.mark.parametrize(("name", "most"), [("BYTES", 8 << 20), ("SECONDS", 0)])
def test_an_example_that_takes_more_fails(monkeypatch, name, most):
    monkeypatch.setattr(fuzzing, name, most)

    @fuzz(1, size=st.just(64 << 20))
    def test(size):
        assert len(b"x" * size) == size

    with pytest.raises(AssertionError, match="for one example"):
        test()

"""Headers of tars, sound and hostile: every file is found, and none costs more than its bytes."""

import io
import os
import subprocess
import tarfile

import pytest

from mofi_jax.data.pictures import tar_headers

END = bytes(1024)
DATA = b"bytes of a picture"


def entry(name, data=b"", kind=b"0", size=None, link=b"", magic=b"ustar\x0000"):
    """A header with its data; `size` is the raw field."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = size or b"%011o\0" % len(data)
    block[156:157], block[157 : 157 + len(link)] = kind, link
    block[257:265] = magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % 512)


def pax(data):
    return entry(b"p", data, b"x")


def listed(tmp_path, data):
    (tmp_path / "0.tar").write_bytes(data)
    return tar_headers.list_members(tmp_path / "0.tar")


def names(listing):
    return [(member.name, member.reason) for member in listing.members]


BEFORE, AFTER = entry(b"k.jpg", DATA), entry(b"m.jpg", DATA) + END


@pytest.mark.parametrize(
    "bad",
    {
        "negative": entry(b"n", size=b"\xff" * 10 + b"\xfe\0"),
        "negative octal": entry(b"n", size=b"-0000001000\0"),
        "no number": entry(b"n", size=b"zzzzzzzzzzz\0"),
        "huge": entry(b"n", size=b"\x80" + b"\xff" * 11),
        "2^60": entry(b"n", size=b"\x80" + (1 << 60).to_bytes(11, "big")),
        "record of a terabyte": entry(
            b"n", kind=b"x", size=b"\x80" + (1 << 40).to_bytes(11, "big")
        ),
        "name of a terabyte": entry(b"n", kind=b"L", size=b"\x80" + (1 << 40).to_bytes(11, "big")),
        "negative record": entry(b"n", kind=b"x", size=b"\xff" * 10 + b"\xfe\0"),
        "name of 5,000": entry(b"n", b"x" * 5000, b"L"),
        "record of two megabytes": pax(b"9" * (2 << 20)),
        "size abc": pax(b"12 size=abc\n"),
        "size -512": pax(b"13 size=-512\n"),
        "size of 5,000 digits": pax(b"5011 size=" + b"9" * 5000 + b"\n"),
        "no length": pax(b"1" * 300_000),
        "blanks": pax(b" " * 300_000),
        "length 0": pax(b"0 path=a\n"),
        "length too large": pax(b"99 path=a\n"),
        "garbage": b"\x01" * 512,
        "zeros, then garbage": bytes(1024) + b"\x01" * 700 + bytes(324),
    }.items(),
    ids=lambda case: case[0],
)
def test_what_cannot_be_is_damage_and_what_lies_around_it_is_read(tmp_path, bad):
    listing = listed(tmp_path, BEFORE + bad[1] + AFTER)
    assert names(listing) == [("k.jpg", None), ("m.jpg", None)]
    assert listing.complete
    [damaged] = listing.damaged
    assert damaged in (1024, 2048)
    for member in listing.members:
        with open(tmp_path / "0.tar", "rb") as file:
            file.seek(member.offset)
            assert file.read(member.length) == DATA


def test_thousands_of_chained_headers_take_no_stack_and_no_square(tmp_path):
    chain = entry(b"l", b"a.jpg\0", b"L") * 20_000
    assert names(listed(tmp_path, BEFORE + chain + AFTER)) == [("k.jpg", None), ("a.jpg", None)]
    chain = pax(b"14 path=a.jpg\n") * 20_000
    assert names(listed(tmp_path, BEFORE + chain + AFTER)) == [("k.jpg", None), ("a.jpg", None)]
    chain = (entry(b"l", b"a.jpg\0", b"L") + b"\x01" * 512) * 2_000
    listing = listed(tmp_path, BEFORE + chain + AFTER)
    assert names(listing) == [("k.jpg", None), ("m.jpg", None)]
    assert len(listing.damaged) == 2_000


def test_what_is_no_file_has_a_reason_and_a_hard_link_is_another_name(tmp_path):
    sparse = (
        b"22 GNU.sparse.major=1\n26 GNU.sparse.name=s.jpg\n"[:22] + b"25 GNU.sparse.name=s.jpg\n"
    )
    parts = [
        entry(b"link.jpg", kind=b"1", link=b"k.jpg"),
        entry(b"twice.jpg", kind=b"1", link=b"link.jpg"),
        entry(b"gone.jpg", kind=b"1", link=b"/etc/passwd"),
        entry(b"symbolic.jpg", kind=b"2", link=b"/etc/passwd"),
        *(entry(b"device.jpg", kind=kind) for kind in (b"3", b"4", b"6")),
        entry(b"holes.jpg", DATA, b"S"),
        pax(sparse) + entry(b"GNUSparseFile.0/s.jpg", DATA),
        entry(b"folder/", kind=b"5"),
        entry(b"old/", kind=b"\0"),
        entry(b"label", kind=b"V"),
        entry(b"comment", b"12 comment=x", b"g"),
    ]
    listing = listed(tmp_path, BEFORE + b"".join(parts) + AFTER)
    assert not listing.damaged
    assert names(listing) == [
        *(("k.jpg", None), ("link.jpg", None), ("twice.jpg", None), ("gone.jpg", "not_a_file")),
        *(("symbolic.jpg", "not_a_file"), *[("device.jpg", "not_a_file")] * 3),
        *(("holes.jpg", "not_a_file"), ("s.jpg", "not_a_file"), ("m.jpg", None)),
    ]
    assert {(member.offset, member.length) for member in listing.members[:3]} == {(512, len(DATA))}


def test_a_tar_behind_a_tar_is_read_and_what_else_follows_the_end_is_not(tmp_path):
    one = entry(b"a.jpg", DATA) + bytes(10240)
    listing = listed(tmp_path, one + BEFORE + END)
    assert names(listing) == [("a.jpg", None), ("k.jpg", None)]
    assert (listing.damaged, listing.complete) == ([], True)
    listing = listed(tmp_path, one + b"signature" * 200)
    assert (names(listing), listing.damaged, listing.complete) == ([("a.jpg", None)], [], True)


def test_files_that_are_no_tars(tmp_path):
    for data in (b"", b"<html>" * 500, os.urandom(4096), entry(b"n", size=b"\xff" * 12)):
        assert listed(tmp_path, data) is None
    assert listed(tmp_path, bytes(10240)) == ([], [], True)


NAMES = ["a.jpg", "é" * 20 + ".jpg", "d" * 60 + "/" + "f" * 60 + ".jpg", "x/" * 90 + "日本.jpg"]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_python_is_read_as_python_reads_it(tmp_path, kind):
    wanted = [name for name in NAMES if kind != tarfile.USTAR_FORMAT or len(name) < 130]
    with tarfile.open(tmp_path / "0.tar", "w", format=kind) as tar:
        for number, name in enumerate(wanted):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = number * 511, 1.5
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    listing = tar_headers.list_members(tmp_path / "0.tar")
    assert [member.name for member in listing.members] == wanted
    with tarfile.open(tmp_path / "0.tar") as tar:
        offsets = [(info.offset_data, info.size) for info in tar]
    assert [(member.offset, member.length) for member in listing.members] == offsets


@pytest.mark.parametrize("dialect", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_every_dialect_of_gnu_tar_is_read(tmp_path, dialect):
    (tmp_path / "0.jpg").write_bytes(DATA)
    os.link(tmp_path / "0.jpg", tmp_path / "1.jpg")
    line = ["tar", f"--format={dialect}", "-cf", "t.tar", "0.jpg", "1.jpg"]
    subprocess.run(line, cwd=tmp_path, check=True)
    listing = tar_headers.list_members(tmp_path / "t.tar")
    assert names(listing) == [("0.jpg", None), ("1.jpg", None)]
    assert listing.members[0].offset == listing.members[1].offset
    assert listing.complete

"""Which files a tar holds, and where. Knows headers, nothing of pairs.

ustar, GNU and pax. Python's `tarfile` believes what a header says: negative sizes lead it in
circles, chained headers into recursion, records cost the square of their length or all the memory
they claim. Here a header counts if its checksum is right and what it says is possible; all else is
damage, behind which the next header is looked for. One pass, in little memory but for the names.
"""

import os
import typing

BLOCK = 512  # bytes; headers and the ends of files lie at multiples of it
_STEP = 1 << 16  # bytes that are read at once
_MAX_RECORD = 1 << 20  # bytes of a pax record or long name; attributes of files are in there too
_MAX_NAME = 4096  # bytes, as for paths on Linux

# Types of entries: files (old, new, contiguous), then what has a name and no bytes of its own.
_FILE, _HARD_LINK, _FOLDER, _NO_BYTES = b"\x0007", b"1", b"5", b"2346"
_SPARSE = b"S"  # GNU's files with holes: their bytes do not lie in one piece
_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL = b"L", b"K", b"xX", b"g"
_RECORDS = _LONG_NAME + _LONG_LINK + _PAX + _PAX_FOR_ALL  # they speak of the next entry


class Member(typing.NamedTuple):
    """A file inside a tar: its name, where its bytes lie, and why it cannot be used or None.

    The reason is "tar_cut_short" where the tar ends inside it, "not_a_file" for links that lead
    nowhere, symbolic links, devices and sparse files.
    """

    name: str
    offset: int
    length: int
    reason: str | None = None


class Listing(typing.NamedTuple):
    """What a tar holds.

    Attributes:
      members: its files in order; a hard link is one more name for the bytes of an earlier file.
      damaged: the bytes at which something begins that is no tar.
      complete: whether it ends in the zeros that tar writes last.
    """

    members: list[Member]
    damaged: list[int]
    complete: bool


class _Header(typing.NamedTuple):
    name: str
    kind: bytes
    size: int
    link: str


def list_members(path: str | os.PathLike[str]) -> Listing | None:
    """The files of an uncompressed tar; None where it holds no header and is no empty tar."""
    members: list[Member] = []
    damaged: list[int] = []
    by_name: dict[str, Member] = {}
    said: dict[str, str] = {}  # by records, of the entry that follows them
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at, ended, entries = 0, False, 0
        while size - at >= BLOCK:
            file.seek(at)
            block, start = file.read(BLOCK), at + BLOCK
            if not block.strip(b"\0"):
                # The end, unless another tar was appended.
                at, ended, said = _skip_zeros(file, at), True, {}
                continue
            header = _parse(block, said)
            end = start + header.size if header else start
            if header and header.kind in _RECORDS and end <= size:
                more = _read_record(header, file)
                if more is not None:
                    at, ended, said = start + _padded(header.size), False, said | more
                    continue
                header = None
            if header is None or end > size:
                found = _find_header(file, start)
                if found is None and header:
                    ended = False
                    if header.kind in _FILE:
                        members.append(Member(header.name, start, header.size, "tar_cut_short"))
                    break
                if found is None and ended:
                    break  # what follows the end is no part of the tar
                damaged.append(at)
                at, ended, said = size if found is None else found, False, {}
                continue
            at, ended, entries = start + _padded(header.size), False, entries + 1
            member = _member(header, said, start, by_name)
            said = {}
            if member:
                by_name[member.name] = member
                members.append(member)
    return Listing(members, damaged, ended) if members or entries or ended else None


def _parse(block: bytes, said: dict[str, str]) -> _Header | None:
    """An entry's header, or a record's, with what records said of the entry; None if it is none."""
    try:
        # The checksum counts itself as blanks.
        if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
            return None
        size = _number(block[124:136])
    except ValueError:
        return None
    kind, name, link = block[156:157], _text(block[:100]), _text(block[157:257])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    if kind in _RECORDS:
        return _Header(name, kind, size, link)
    name = said.get("GNU.sparse.name") or said.get("path") or name
    if kind in _HARD_LINK + _FOLDER + _NO_BYTES or (kind == b"\0" and name.endswith("/")):
        kind, size = (_FOLDER if kind == b"\0" else kind), 0
    else:
        size = int(said.get("size", size))
    return _Header(name, kind, size, said.get("linkpath") or link)


def _member(
    header: _Header, said: dict[str, str], start: int, by_name: dict[str, Member]
) -> Member | None:
    """What an entry is, if it is a file or one would take it for one."""
    if header.kind in _HARD_LINK and header.link in by_name:
        return by_name[header.link]._replace(name=header.name)
    if header.kind in _FILE:
        sparse = any(key.startswith("GNU.sparse.") for key in said)
        return Member(header.name, start, header.size, "not_a_file" if sparse else None)
    if header.kind in _HARD_LINK + _NO_BYTES + _SPARSE:
        return Member(header.name, start, 0, "not_a_file")
    return None


def _read_record(header: _Header, file: typing.BinaryIO) -> dict[str, str] | None:
    """What a record says of the next entry, of what matters here; None if it cannot be read."""
    if header.size > _MAX_RECORD:
        return None
    data = file.read(header.size)
    if header.kind in _PAX_FOR_ALL:
        return {}  # of all entries the same: a comment, never a name
    if header.kind in _PAX:
        return _parse_pax(data)
    name = _text(data)
    return {"path" if header.kind in _LONG_NAME else "linkpath": name} if _fits(name) else None


def _parse_pax(data: bytes) -> dict[str, str] | None:
    """The fields "LENGTH KEY=VALUE\\n"."""
    said, at = {}, 0
    while at < len(data) and data[at]:
        digits, blank, _ = data[at : at + 20].partition(b" ")
        end = at + int(digits) if blank and digits.isdigit() else at
        key, equals, value = data[at + len(digits) + 1 : max(end - 1, 0)].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            return None
        at = end
        if key == b"size" and not (value.isdigit() and len(value) < 20):
            return None
        if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse."):
            said[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return said if all(map(_fits, said.values())) else None


def _fits(name: str) -> bool:
    return len(name) <= _MAX_NAME


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Octal digits, or a big-endian number behind the byte 0x80.

    Raises:
      ValueError: neither; a negative number is none.
    """
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits and not digits.isdigit():
        raise ValueError(field)
    return int(digits or b"0", 8)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _skip_zeros(file: typing.BinaryIO, at: int) -> int:
    """Where the first block after `at` begins that is not all zeros; the end of the file."""
    file.seek(at)
    while chunk := file.read(_STEP):
        rest = len(chunk.lstrip(b"\0"))
        if rest:
            return (at + len(chunk) - rest) // BLOCK * BLOCK
        at += len(chunk)
    return at


def _find_header(file: typing.BinaryIO, at: int) -> int | None:
    """Where the next header begins that says of itself that it is one."""
    file.seek(at)
    while chunk := file.read(_STEP):
        for start in range(0, len(chunk), BLOCK):
            block = chunk[start : start + BLOCK]
            if block[257:262] == b"ustar" and len(block) == BLOCK and _parse(block, {}):
                return at + start
        at += len(chunk)
    return None

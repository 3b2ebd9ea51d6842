"""WordNet's own dict folder: words, senses, hypernyms, glosses, damaged lines."""

import pytest

from data_prep.kb import build as kb_build
from data_prep.kb import lookup
from data_prep.kb.sources import dump as kb_dump
from data_prep.kb.sources import wordnet
from mofi_jax.common import errors
from tests import inputs

LICENCE = """  1 This software and database is being provided to you, the LICENSEE, by
  2 Princeton University under the following license.
"""
# True lines, with fewer pointers.
DATA = (
    LICENCE
    + """\
00001740 03 n 01 entity 0 001 ~ 00021939 n 0000 | that which is perceived or known
00021939 03 n 02 artifact 0 artefact 0 001 @ 00001740 n 0000 | a man-made object taken as a whole
02696165 06 n 01 alarm_clock 0 002 @ 00021939 n 0000 #p 00021939 n 0000 | a clock that wakes | rings
08860123 15 n 03 U.K. 0 UK 1 Britain 0 002 @i 00021939 n 0000 @ 00021939 v 0000 | isle
05802912 09 n 0b b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 k 0 artifact 3 000 | eleven words
"""
)
INDEX = (
    LICENCE
    + """\
alarm_clock n 1 2 @ #p 1 1 02696165
artefact n 1 2 @ ~ 1 0 00021939
artifact n 2 2 @ ~ 2 1 05802912 00021939
britain n 1 1 @i 1 1 08860123
entity n 1 1 ~ 1 1 00001740
u.k. n 1 1 @i 1 0 08860123
""".replace("\n", "  \n")  # as in the true file
)


def write(folder, data=DATA, index=INDEX):
    folder.mkdir(exist_ok=True)
    (folder / "data.noun").write_text(data)
    (folder / "index.noun").write_text(index)
    return folder


def test_synsets_become_rows(tmp_path):
    rows = {row["id"]: row for row in wordnet.rows(str(write(tmp_path / "dict")))}
    assert list(rows) == ["n00001740", "n00021939", "n02696165", "n08860123", "n05802912"]
    assert rows["n00021939"] == {
        "id": "n00021939",
        "label": "artifact",
        "aliases": ["artefact"],
        "description": "a man-made object taken as a whole",
        "hypernyms": ["n00001740"],
        "lexname": "noun.Tops",
        "sense_rank": [2, 1],
    }
    assert rows["n02696165"]["label"] == "alarm clock"
    assert rows["n02696165"]["description"] == "a clock that wakes | rings"
    assert rows["n08860123"]["hypernyms"] == ["n00021939"]  # nouns alone, of instances too
    assert rows["n08860123"]["sense_rank"] == [1, 1, 1]  # the index lacks "uk"
    assert rows["n05802912"]["aliases"] == [*"cdefghijk", "artifact"]  # 0b words are eleven


def test_a_folder_is_built_and_prepared_like_a_file(tmp_path):
    source = write(tmp_path / "dict")
    assert kb_dump.format_of(str(source)) == kb_dump.WORDNET
    manifest = kb_build.build(source, tmp_path / "kb", inputs.kb_rules())
    assert manifest["counts"]["entities"] == 5
    assert [entry["path"].rpartition("/")[2] for entry in manifest["inputs"]] == list(wordnet.FILES)
    columns = ["kind", "kind_from"]
    told = lookup.read_entities(tmp_path / "kb").select(columns).to_pylist()
    assert [tuple(row.values()) for row in told][2:] == [
        ("artifact", "given"),
        ("place", "given"),
        ("abstract", "given"),
    ]
    base = lookup.KnowledgeBase(tmp_path / "kb")
    assert dict(base.candidates("artifact", 5)) == pytest.approx({4: 2 / 3, 1: 1 / 3})
    assert base.candidates("alarmclock", 5) == [(2, 1.0)]
    qids = lookup.read_entities(tmp_path / "kb")["qid"].to_pylist()
    assert qids[2] == "n02696165"


@pytest.mark.parametrize(
    "line",
    [
        "00001740 03 n 02 entity 0 000 | too few words",
        "00001740 03 n 01 entity 0 001 @ 00021939 n | half a pointer",
        "1740 03 n 01 entity 0 000 | a short place",
        "00001740 03 n zz entity 0 000 | no number",
        "00001740",
    ],
)
def test_damaged_lines_are_told(tmp_path, line):
    folder = write(tmp_path / "dict", data=DATA + line + "\n")
    with pytest.raises(errors.BadInput, match=r"data\.noun, line 8 is not in WordNet's format"):
        list(wordnet.rows(str(folder)))
    folder = write(tmp_path / "dict", index=INDEX + "broken n x\n")
    with pytest.raises(errors.BadInput, match=r"index\.noun, line 9 is not in WordNet's format"):
        list(wordnet.rows(str(folder)))

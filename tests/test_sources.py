"""Sources: patterns, captions good and bad, repeated keys, several sources, pointers."""

import gzip
import hashlib
import os

import hypothesis
import pytest
from hypothesis import strategies as st

from configs import common
from data_prep import engine
from data_prep.pairs import files as source_files
from data_prep.pairs import samples, unique
from data_prep.pairs import stage as pairs_stage
from mofi_jax.common import errors
from tests.inputs import make_config, picture, read, run, tables_of, tar_bytes


def test_a_pair_and_its_pointer(tmp_path):
    data = picture(48, 32, "jpeg")
    pairs, rejects, counts = run(
        tmp_path, [("a.jpg", data), ("a.txt", "a  red\n apple \u00e9".encode()), ("a.json", b"{}")]
    )
    row = pairs["a"]
    assert (row["text"], row["width"], row["height"]) == ("a red apple \u00e9", 48, 32)
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    with open(row["path"], "rb") as file:
        file.seek(row["offset"])
        assert file.read(row["length"]) == data
    assert rejects == {}
    assert counts == {
        "members": 3,
        "pairs": 1,
        "rejected": 0,
        "duplicate_keys": 0,
        "captions_cut": 0,
        "without_caption": 0,
        "tars_cut_short": 0,
        "tars_damaged": 0,
        "tars_unreadable": 0,
        "pairs_missing": 0,
        "not_downloaded": 0,
    }


def test_captions_that_cannot_be_used_are_told(tmp_path):
    captions = {
        "latin1": "caf\u00e9".encode("latin-1"),
        "empty": b"",
        "blank": b" \n\t ",
        "control": b"\x00\x07",
        "bom": b"\xef\xbb\xbf",
    }
    members = [(f"{key}.png", picture()) for key in (*captions, "alone")]
    members += [(f"{key}.txt", text) for key, text in captions.items()]
    pairs, rejects, _ = run(tmp_path, [*members, ("words.txt", b"no picture")])
    assert pairs == {}
    assert rejects == {
        "latin1": "caption_not_utf8",
        "empty": "empty_caption",
        "blank": "empty_caption",
        "control": "empty_caption",
        "bom": "empty_caption",
        "alone": "no_text",
        "words": "no_picture",
    }


def test_long_captions_are_cut_at_a_word_and_counted(tmp_path):
    long = ("lorem " * 2_000).encode()
    members = [("a.png", picture()), ("a.txt", long), ("b.png", picture()), ("b.txt", b"short")]
    pairs, rejects, counts = run(tmp_path, members)
    assert pairs["a"]["text"] == ("lorem " * 166).strip()
    assert rejects == {}
    assert counts["captions_cut"] == 1


@hypothesis.given(st.text(), st.integers(1, 40))
def test_cut_captions_end_at_words(text, limit):
    text = samples.clean_caption(text)
    cut = samples.cut_caption(text, limit)
    assert len(cut) <= limit
    assert text.startswith(cut)
    assert (cut == text) == (len(text) <= limit)
    if cut and " " in text[:limit] and cut != text:
        assert text[len(cut)] == " "
    assert not any(ord(character) < 32 for character in text)


def test_captions_are_what_html_means(tmp_path):
    captions = {
        "amp": ("Marks &amp; Spencer", "Marks & Spencer"),
        "twice": ("AT&amp;amp;T tower", "AT&T tower"),
        "quote": ("the &quot;red&nbsp;ball&quot; of the caf&#233;", 'the "red ball" of the café'),
        "plain": ("Marks & Spencer, AT&T", "Marks & Spencer, AT&T"),
        "hyphen": ("light\u00adhouse &shy;red\u200bball", "lighthouse redball"),
        "digits": ("&#" + "9" * 5_000 + ";", "&#" + "9" * 998),
    }
    members = [(f"{key}.png", picture()) for key in captions]
    members += [(f"{key}.txt", text.encode()) for key, (text, _) in captions.items()]
    pairs, rejects, _ = run(tmp_path, members)
    assert {key: row["text"] for key, row in pairs.items()} == {
        k: c for k, (_, c) in captions.items()
    }
    assert rejects == {}


@hypothesis.given(st.text())
@hypothesis.example("new\nline\r\u2028\x85")
@hypothesis.example(" \ufeffblank ")
@hypothesis.example("\x1b[31mred\x1b]0;t\x07")
@hypothesis.example("caf\udce9")
def test_a_key_is_one_visible_line_and_survives_a_file(text):
    key = samples.spell_key(text)
    assert key.encode().decode("utf-8-sig").splitlines() == ([key] if key else [])
    assert key.strip() == key
    assert samples.spell_key(key) == key
    if text.isprintable() and text.strip() == text:
        assert key == text


def test_keys_are_spelt_out(tmp_path):
    names = ("new\nline", " blank", "\x1b[31mred")
    pairs, _, _ = run(
        tmp_path,
        [(f"{n}.{kind}", d) for n in names for kind, d in (("png", picture()), ("txt", b"x"))],
    )
    assert list(pairs) == [r"new\nline", r"\x20blank", r"\x1b[31mred"]


def test_values_that_are_no_json_are_left_out():
    values = {"a": [1, float("nan")], "b": float("inf"), "c": 1, "d": {"x": "é"}, "e": b"", "f": ""}
    assert samples.extras_json(values, "fedcba") == '{"c": 1, "d": {"x": "é"}}'
    assert samples.extras_json({"a": float("nan")}, ["a"]) is None


def write_tars(folder, shards):
    """Each shard is a list of (key, text); the picture's side tells its shard."""
    folder.mkdir()
    for number, pairs in enumerate(shards):
        members = []
        for key, text in pairs:
            members += [(f"{key}.png", picture(30 + number)), (f"{key}.txt", text.encode())]
        (folder / f"{number:05d}.tar").write_bytes(tar_bytes(members))


def test_of_a_key_in_several_tars_the_first_is_kept_and_every_sample_counted_once(tmp_path, caplog):
    write_tars(
        tmp_path / "in",
        [
            [("a", "one"), ("b", "one"), ("b", "again")],
            [("c", "two"), ("a", "two"), ("empty", "")],
            [("a", "three"), ("c", "three"), ("d", "three")],
        ],
    )
    manifests = pairs_stage.run(make_config(tmp_path / "in"), engine.Engine(tmp_path / "w"))
    rows = [row for shard in tables_of(tmp_path / "w", "pairs/*") for row in shard]
    kept = [("a", "one"), ("b", "one"), ("c", "two"), ("d", "three")]
    assert [(row["key"], row["text"]) for row in rows] == kept
    shards = tables_of(tmp_path / "w", "rejects/pairs-*")
    rejects = sorted((row["key"], row["reason"]) for shard in shards for row in shard)
    repeated = [(key, "duplicate_key") for key in "aabc"]
    assert rejects == [*repeated, ("empty", "empty_caption")]
    counts = engine.total_counts(manifests)
    assert (counts["pairs"], counts["rejected"], counts["duplicate_keys"]) == (4, 5, 4)
    assert counts["pairs"] + counts["rejected"] == 9
    assert "4 of the samples bear the key of another" in caplog.text


def test_a_repeated_key_that_goes_away_brings_the_other_back(tmp_path):
    write_tars(tmp_path / "in", [[("a", "one")], [("a", "two"), ("b", "two")]])
    for _ in range(2):
        pairs_stage.run(make_config(tmp_path / "in"), engine.Engine(tmp_path / "w"))
    assert read(tmp_path / "w")[1] == {"a": "duplicate_key"}
    (tmp_path / "in/00000.tar").write_bytes(tar_bytes([("z.png", picture()), ("z.txt", b"z")]))
    pairs_stage.run(make_config(tmp_path / "in"), engine.Engine(tmp_path / "w"))
    pairs, rejects = read(tmp_path / "w")
    assert {key: row["text"] for key, row in pairs.items()} == {"z": "z", "a": "two", "b": "two"}
    assert rejects == {}
    assert not list((tmp_path / "w/unique").glob("*.parquet"))


def test_several_sources_are_mixed_under_their_names(tmp_path):
    write_tars(tmp_path / "x", [[("a", "x")]])
    write_tars(tmp_path / "y", [[("a", "y")]])
    for folder in ("x", "y"):
        (tmp_path / folder / "00001.tar.gz").write_bytes(
            gzip.compress(tar_bytes([("b.png", picture()), ("b.txt", b"packed")]))
        )
    config = make_config(tmp_path / "x", tmp_path / "y" / "*.tar*")
    pairs_stage.run(config, engine.Engine(tmp_path / "w"))
    pairs, rejects = read(tmp_path / "w")
    assert {key: row["source"] for key, row in pairs.items()} == {
        "s0/a": "s0",
        "s0/b": "s0",
        "s1/a": "s1",
        "s1/b": "s1",
    }
    assert [pairs[key]["text"] for key in ("s0/a", "s1/a")] == ["x", "y"]
    assert pairs["s1/b"]["path"] == "unpacked/s1-00001.tar"
    assert rejects == {}


def test_captions_in_arabic_keep_every_letter_and_lose_what_cannot_be_seen(tmp_path):
    text = "\u062a\u0641\u0651\u0627\u062d\u0629 \u062d\u0645\u0631\u0627\u0621"
    marked = f"\u200f\u202b{text}\u202c\n"
    persian = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # the joiner is spelling
    decomposed = "cafe\u0301"
    members = []
    for key, words in (("a", marked), ("b", persian), ("c", decomposed), ("d", "\u200f \u2067")):
        members += [(f"{key}.png", picture()), (f"{key}.txt", words.encode())]
    pairs, rejects, _ = run(tmp_path, members)
    assert {k: row["text"] for k, row in pairs.items()} == {
        "a": text,
        "b": persian,
        "c": decomposed,
    }
    assert rejects == {"d": "empty_caption"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ((), "give a tuple of NAME=PATTERN"),
        ("x=a.tar", "give a tuple of NAME=PATTERN"),
        (("a.tar",), "is not NAME=PATTERN"),
        (("a b=x.tar",), "is not NAME=PATTERN"),
        (("a=",), "is not NAME=PATTERN"),
        (("a=x.tar", "a=y.tar"), "two sources are called a"),
    ],
)
def test_sources_that_are_written_wrongly_are_told(entries, words):
    with pytest.raises(errors.BadInput, match=words):
        pairs_stage.find(entries)


def test_two_packed_files_of_one_name_are_told(tmp_path):
    for path in ("a/0.tar.gz", "b/0.tar.gz", "b/c-0.tar.gz", "b/c/0.tar.gz"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    found = pairs_stage.find([f"x={tmp_path}/*/0.tar.gz"])
    assert [file.unpacked for file in found] == ["a-0.tar", "b-0.tar"]
    with pytest.raises(errors.BadInput, match=r"would be unpacked to b-c-0\.tar: rename"):
        pairs_stage.find([f"x={tmp_path}"])


def test_sources_in_short(tmp_path):
    assert source_files.shorthand("data/cc3m/*.tar") == ("cc3m=data/cc3m/*.tar",)
    assert source_files.shorthand("a/x+y@b/") == ("x=a/x", "y=b/")
    assert source_files.shorthand("tfds:i2t:train[:5]@/d") == ("i2t=tfds:i2t:train[:5]@/d",)
    assert source_files.shorthand("t@tfds:i2t@/d+/") == ("t=tfds:i2t@/d", "pairs=/")
    both = source_files.shorthand(f"mine@tfds:i2t+b@{tmp_path}")
    assert both == ("mine=tfds:i2t", f"b={tmp_path}")
    odd = tmp_path / "a+b@c"
    odd.mkdir()
    assert source_files.shorthand(str(odd)) == (f"a_b_c={odd}",)


def test_marks_of_the_short_form_may_be_in_paths(tmp_path):
    one, other = tmp_path / "c++", tmp_path / "me@work+home"
    for folder in (one, other, tmp_path / "plain"):
        folder.mkdir()
        (folder / "0.tar").touch()
    for folder, pattern in ((one, f"{one}/*.tar"), (other, f"{other}/*.tar"), (other, f"{other}")):
        name = folder.name.replace("+", "_").replace("@", "_")
        assert source_files.shorthand(pattern) == (f"{name}={pattern}",)
        assert source_files.shorthand(f"{tmp_path}/plain+mine@{pattern}+{one}") == (
            f"plain={tmp_path}/plain",
            f"mine={pattern}",
            f"c__={one}",
        )
    assert source_files.shorthand(f"tfds:i2t@{one}+{other}") == (
        f"i2t=tfds:i2t@{one}",
        f"me_work_home={other}",
    )


def test_nothing_to_read_is_told(tmp_path):
    with pytest.raises(errors.BadInput, match=r"missing\.tar does not exist: name a folder"):
        pairs_stage.run(make_config(tmp_path / "missing.tar"), engine.Engine(tmp_path / "w"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.BadInput, match="empty holds nothing that is known: name"):
        pairs_stage.run(make_config(tmp_path / "empty"), engine.Engine(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_pictures_come_in_the_order_of_the_disk(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(range(100)))
    paths, offsets, lengths = ["b", "a", "b", "a"], [50, 7, 3, 0], [2, 1, 2, 3]
    found = list(pairs_stage.read_pictures(tmp_path, paths, offsets, lengths))
    assert found == [(3, bytes([0, 1, 2])), (1, bytes([7])), (2, bytes([3, 4])), (0, b"23")]
    with pytest.raises(errors.BadInput, match="b is not as long as when its pictures were"):
        list(pairs_stage.read_pictures(tmp_path, ["b"], [99], [2]))
    with pytest.raises(errors.BadInput, match="c is gone since its pictures were listed"):
        list(pairs_stage.read_pictures(tmp_path, ["c"], [0], [2]))


def test_two_workers_write_the_same_bytes(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for shard in range(3):
        members = []
        for number in range(4):
            key = f"{shard:05d}{number:04d}"
            members += [(f"{key}.png", picture(30 + number)), (f"{key}.txt", key.encode())]
        (folder / f"{shard:05d}.tar.gz").write_bytes(gzip.compress(tar_bytes(members)))
    digests = []
    for workers in (1, 2):
        manifests = pairs_stage.run(
            make_config(folder), engine.Engine(tmp_path / f"w{workers}", workers)
        )
        digests.append([manifest["outputs"] for manifest in manifests])
    assert digests[0] == digests[1]


def test_one_more_file_changes_the_shards_of_its_own_run_only(tmp_path):
    write_tars(tmp_path / "in", [[(f"{n:02d}{i}", "x") for i in range(3)] for n in range(10)])
    config = make_config(tmp_path / "in", rows_per_shard=6)
    pairs_stage.run(config, engine.Engine(tmp_path / "w"))

    def made():
        return {
            (stage, path.name): os.stat(path).st_mtime_ns
            for stage in ("indexed", "pairs")
            for path in engine.listed(tmp_path / "w" / stage)
            if not path.name.endswith("-rejects.parquet")
        }

    before = made()
    assert 3 <= sum(stage == "pairs" for stage, _ in before) <= 8  # of about 6 rows
    # Between others, so that all numbers behind it change.
    members = [("new.png", picture()), ("new.txt", b"new")]
    (tmp_path / "in/00004b.tar").write_bytes(tar_bytes(members))
    pairs_stage.run(config, engine.Engine(tmp_path / "w"))
    after = made()
    changed = {place for place in {*before, *after} if before.get(place) != after.get(place)}
    assert [name for stage, name in changed if stage == "indexed"] == ["s0-00004b.parquet"]
    assert 1 <= len([name for stage, name in changed if stage == "pairs"]) <= 2
    # A tar that is repaired, likewise.
    (tmp_path / "in/00007.tar").write_bytes(
        tar_bytes([("fixed.png", picture()), ("fixed.txt", b"x")])
    )
    pairs_stage.run(config, engine.Engine(tmp_path / "w"))
    repaired = made()
    changed = [place for place in repaired if repaired[place] != after.get(place)]
    assert [name for stage, name in changed if stage == "indexed"] == ["s0-00007.parquet"]


@hypothesis.given(
    st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(0, 30), min_size=1),
    st.text("abc", min_size=1, max_size=4),
)
def test_runs_of_shards_hold_each_once_and_one_more_shard_moves_no_other(rows, new):
    runs = unique.runs_of(rows, 10)
    assert [name for run in runs for name in run] == sorted(rows)
    changed = unique.runs_of({**rows, new: 1}, 10)
    ends = {run[-1] for run in runs}
    if all(sum(rows[name] for name in run) < 30 for run in runs):  # none ended by its size
        assert {run[-1] for run in changed} - {new} >= ends - {new, max(rows)}


@pytest.mark.parametrize("name", ["in [x]", "a*b", "w?", "s=1,t=2", "a+b", "**"])
def test_names_that_look_like_patterns_are_names(tmp_path, name):
    folder = tmp_path / name
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "in x").mkdir()  # what "in [x]" would mean as a pattern
    for path in ("0.tar", "1.tar", "sub/2.tar", "._0.tar", "../in x/3.tar"):
        (folder / path).touch()

    def found(pattern):
        return [os.path.relpath(f.path, folder) for f in pairs_stage.find([f"s={pattern}"])]

    assert found(f"{folder}/*.tar") == ["0.tar", "1.tar"]
    assert found(folder) == ["0.tar", "1.tar", "sub/2.tar"]
    assert found(f"{folder}/1.tar") == ["1.tar"]
    assert found(f"{folder}/**/*.tar") == ["0.tar", "1.tar", "sub/2.tar"]


def test_tgz_is_another_word_for_tar_gz(tmp_path):
    (tmp_path / "0.tgz").write_bytes(
        gzip.compress(tar_bytes([("a.png", picture()), ("a.txt", b"x")]))
    )
    pairs_stage.run(make_config(tmp_path), engine.Engine(tmp_path / "w"))
    assert read(tmp_path / "w")[0]["a"]["path"] == "unpacked/0.tar"


def test_a_file_name_that_is_not_utf_8_is_told(tmp_path):
    (tmp_path / "caf\udce9.tar").touch()
    with pytest.raises(errors.BadInput, match=r"caf\\udce9\.tar is not UTF-8: rename it"):
        pairs_stage.find([f"s={tmp_path}"])


def test_what_is_read_is_not_told_as_left_out():
    """Packed tars are archives of others, but the sample's are read."""
    told = []
    found = source_files.find(
        (f"sample={common.SAMPLE}/pairs",), warn=lambda *args: told.append(args)
    )
    assert (len(found), told) == (4, [])

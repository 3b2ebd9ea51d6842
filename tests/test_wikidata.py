"""Wikidata's dump: the traps of its format, dropping by rule, compressions, damage, resume."""

import bz2
import codecs
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from configs import kb as kb_config
from data_prep.kb import build as kb_build
from data_prep.kb import lookup
from data_prep.kb.sources import dump as kb_dump
from data_prep.kb.sources import wikidata
from mofi_jax.common import errors


def statement(prop, value, rank="normal", snaktype="value"):
    snak = {"snaktype": snaktype, "property": prop, "hash": "4679cd3654f1bf98b2fa4bd845620050"}
    if snaktype == "value":
        if value.startswith("Q") and value[1:].isdigit():
            entity = {"entity-type": "item", "numeric-id": int(value[1:]), "id": value}
            snak["datavalue"] = {"value": entity, "type": "wikibase-entityid"}
        else:
            snak["datavalue"] = {"value": value, "type": "string"}
    return {"mainsnak": snak, "type": "statement", "id": f"x${prop}", "rank": rank}


def item(qid, labels, *, aliases=None, descriptions=None, claims=(), links=(), kind="item"):
    """An entity as the dump writes it; texts are `language: text`, aliases `language: [texts]`."""
    maps = [
        {code: {"language": code, "value": text} for code, text in (texts or {}).items()}
        for texts in (labels, descriptions)
    ]
    grouped = {}
    for claim in claims:
        grouped.setdefault(claim["mainsnak"]["property"], []).append(claim)
    return {
        "type": kind,
        "id": qid,
        "labels": maps[0],
        "descriptions": maps[1],
        "aliases": {
            code: [{"language": code, "value": text} for text in texts]
            for code, texts in (aliases or {}).items()
        },
        "claims": grouped,
        "sitelinks": {
            site: {"site": site, "title": title, "badges": []}
            for site, title in dict(links).items()
        },
        "pageid": 12,
        "ns": 0,
        "title": qid,
        "lastrevid": 5,
        "modified": "2026-07-25T12:00:00Z",
    }


EN = {"enwiki": "A title"}
DISAMBIGUATION = "Q4167410"
P31 = "P31"


def entities():
    """(entity, why it is dropped or None), with all traps of the format."""
    told = {"en": "Tea", "de": "Tee"}
    yield (
        item(
            "Q1",
            told,
            aliases={"en": ["cup of tea", "tea", "Tea"], "de": ["Tee mit Milch"]},
            descriptions={"en": "hot drink", "de": "Getränk"},
            claims=[
                statement(P31, "Q5"),
                statement(P31, "Q6"),
                statement("P279", "Q7"),
                statement("P18", "Tea.jpg"),
                statement("P18", "Best.jpg", "preferred"),
                statement("P625", "P18"),
            ],
            links={"enwiki": "Tea", "dewiki": "Tee"},
        ),
        None,
    )
    yield item("Q2", {"en": "only a picture"}, claims=[statement("P18", "a.png")]), None
    yield item("Q3", {"en": "German only in Wikipedia"}, links={"dewiki": "x"}), None
    yield (
        item("Q4", {"en": "old"}, claims=[statement(P31, DISAMBIGUATION, "deprecated")], links=EN),
        None,
    )
    yield (
        item(
            "Q5",
            {"en": "preferred wins"},
            claims=[statement(P31, DISAMBIGUATION), statement(P31, "Q6", "preferred")],
            links=EN,
        ),
        None,
    )
    yield (
        item("Q6", {"en": "unknown"}, claims=[statement(P31, "", snaktype="somevalue")], links=EN),
        None,
    )
    yield (
        item("Q7", {"en": "none"}, claims=[statement(P31, "", snaktype="novalue")], links=EN),
        None,
    )
    empty = item("Q8", {"en": 'quotes " and \\ and "en": {}'}, links=EN)
    yield empty | {"aliases": [], "descriptions": [], "claims": []}, None
    yield (
        item(
            "Q9",
            {"en": "both"},
            claims=[statement(P31, "Q6"), statement(P31, DISAMBIGUATION)],
            links=EN,
        ),
        "disambiguation",
    )
    for number, (reason, qid) in enumerate(kb_config.get_config().drop_types.items()):
        yield item(f"Q1{number}", {"en": reason}, claims=[statement(P31, qid)], links=EN), reason
    yield item("P31", {"en": "instance of"}, kind="property", links=EN), "property"
    yield item("L1", {"en": "a word"}, kind="lexeme", links=EN), "no_item"
    yield item("Q19", {"de": "Tee", "mul": "Tea"}, aliases={"mul": ["Chai"]}, links=EN), None
    yield item("Q20", {"de": "Tee", "en-gb": "tea"}, links=EN), "no_label"
    yield item("Q21", {"en": "  "}, links=EN), "no_label"
    yield item("Q22", {}, links=EN) | {"labels": []}, "no_label"
    yield item("Q23", {"en": "nothing links here"}), "unlinked"
    yield item("Q24", {"en": "a list"}) | {"sitelinks": [], "claims": []}, "unlinked"


def line(entity):
    return json.dumps(entity, separators=(",", ":")).encode()


def dump(lines):
    return b"[\n" + b",\n".join(lines) + b"\n]\n"


KEPT = [entity["id"] for entity, reason in entities() if reason is None]


def config(**changes):
    made = kb_config.get_config()
    made.update({"chunk_lines": 3, "workers": 1, **changes})
    return made


def read(folder):
    return {row["qid"]: row for row in lookup.read_entities(folder).to_pylist()}


def rejects(folder):
    rows = pq.read_table(folder / "rejects.parquet").to_pylist()
    return [(row["key"], row["reason"]) for row in rows]


def test_every_trap_of_the_format(tmp_path):
    lines = [line(entity) for entity, _ in entities()]
    lines.insert(2, lines[0][:400])  # cut in the middle
    lines.insert(4, b'{"type":"item","id":"Q77","labels":["en"]}')
    (tmp_path / "dump.json").write_bytes(dump(lines))
    manifest = kb_build.build(tmp_path / "dump.json", tmp_path / "kb", config())
    found = read(tmp_path / "kb")
    assert list(found) == KEPT
    assert rejects(tmp_path / "kb") == [("line 4", "broken_json"), ("line 6", "wrong_type")]
    counts = manifest["counts"]
    expected = {}
    for _, reason in entities():
        if reason:
            expected[f"dropped_{reason}"] = expected.get(f"dropped_{reason}", 0) + 1
    assert {key: n for key, n in counts.items() if key.startswith("dropped_")} == expected
    assert counts["entities"] + counts["rejected"] + sum(expected.values()) == len(lines)
    assert found["Q1"] == {
        "qid": "Q1",
        "label": "Tea",
        "aliases": ["cup of tea", "tea"],
        "description": "hot drink",
        "hypernyms": ["Q7"],
        "types": ["Q5", "Q6"],
        "sitelinks": 2,
        "image": "Best.jpg",
        "title": "Tea",
        "kind": "person",
        "kind_from": "given",
    }
    assert (found["Q3"]["sitelinks"], found["Q3"]["title"], found["Q3"]["image"]) == (1, None, None)
    assert found["Q4"]["types"] == []
    assert found["Q5"]["types"] == ["Q6"]
    assert (found["Q19"]["label"], found["Q19"]["aliases"]) == ("Tea", ["Chai"])
    assert found["Q8"]["label"] == 'quotes " and \\ and "en": {}'


def test_rules_of_the_configuration(tmp_path):
    lines = [line(entity) for entity, _ in entities()]
    (tmp_path / "dump.json").write_bytes(dump(lines))
    everything = kb_config.get_config("languages=de+en")
    assert everything.languages == ("de", "en", "mul")
    everything.update({"need_link_or_image": False, "workers": 1, "alpha": 0.0})
    everything.drop_types.disambiguation = ""
    kb_build.build(tmp_path / "dump.json", tmp_path / "kb", everything)
    found = read(tmp_path / "kb")
    (page,) = (qid for qid, row in found.items() if row["label"] == "disambiguation")
    assert {*KEPT, "Q9", page, "Q20", "Q23", "Q24"} == set(found)
    assert found["Q1"]["label"] == "Tee"
    assert found["Q1"]["aliases"] == ["Tea", "Tee mit Milch", "cup of tea", "tea"]
    assert found["Q1"]["description"] == "Getränk"
    assert found["Q19"]["aliases"] == ["Tea", "Chai"]
    base = lookup.KnowledgeBase(tmp_path / "kb")
    rows = list(found)
    priors = {rows[entity]: prior for entity, prior in base.candidates("tea", 10)}
    assert priors == pytest.approx({"Q1": 0.5, "Q19": 0.5})  # alpha 0: sitelinks do not count


@pytest.mark.parametrize("languages", ["", "en+", "+"])
def test_languages_are_codes(languages):
    with pytest.raises(errors.BadInput, match="has an empty code: write for example"):
        kb_config.get_config(f"languages={languages}")


# ------------------------------------------------------------------------------- files and pipes


def in_streams(compress, data):
    return compress(data[:1000]) + compress(data[1000:1500]) + compress(data[1500:])


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".json.bz2"])
def test_compressed_in_several_streams_and_by_several_workers_it_is_the_same(tmp_path, suffix):
    data = dump([line(entity) for entity, _ in entities()] * 3)
    pack = {".json": bytes, ".json.gz": gzip.compress, ".json.bz2": bz2.compress}[suffix]
    (tmp_path / f"dump{suffix}").write_bytes(in_streams(pack, data))
    (tmp_path / "plain.json").write_bytes(data)
    several = kb_build.build(tmp_path / f"dump{suffix}", tmp_path / "a", config(workers=2))
    one = kb_build.build(tmp_path / "plain.json", tmp_path / "b", config(chunk_lines=50))
    for first, second in zip(several["outputs"], one["outputs"], strict=True):
        if not first["path"].endswith("rejects.parquet"):  # it names the stage, after the folder
            assert first["sha256"] == second["sha256"], first["path"]
    assert several["counts"] == one["counts"]
    assert several["counts"]["rejected"] == 2 * len(KEPT)
    assert {reason for _, reason in rejects(tmp_path / "a")} == {"duplicate_id"}


@pytest.mark.parametrize("brackets", [True, False])
def test_standard_input(tmp_path, monkeypatch, brackets):
    lines = [line(entity) for entity, _ in entities()]
    data = dump(lines) if brackets else b"\n".join(lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    manifest = kb_build.build(kb_dump.STDIN, tmp_path / "kb", config())
    assert list(read(tmp_path / "kb")) == KEPT
    assert manifest["inputs"] == []


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".json.bz2"])
def test_a_dump_that_is_cut_or_damaged_is_told(tmp_path, suffix):
    data = dump([line(entity) for entity, _ in entities()])
    pack = {".json": bytes, ".json.gz": gzip.compress, ".json.bz2": bz2.compress}[suffix]
    path = tmp_path / f"dump{suffix}"
    path.write_bytes(pack(data)[: len(pack(data)) // 2])
    with pytest.raises(errors.BadInput, match=r"(ends|damaged) after line \d+.*fetch it again"):
        kb_build.build(path, tmp_path / "kb", config())
    path.write_bytes(pack(data[:-3]))  # whole, but the bracket is missing
    with pytest.raises(errors.BadInput, match="without the closing bracket of a dump"):
        kb_build.build(path, tmp_path / "kb", config())
    if suffix != ".json":
        path.write_bytes(b"this is no archive at all" * 100)
        with pytest.raises(errors.BadInput, match="is damaged after line 0"):
            kb_build.build(path, tmp_path / "kb", config())
    assert not (tmp_path / "kb/manifest.json").exists()


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("brackets", [True, False])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_ends_of_lines_and_brackets_make_no_difference(tmp_path, end, brackets, mark):
    lines = [line(entity) for entity, _ in entities()]
    data = dump(lines) if brackets else b"\n".join(lines)
    (tmp_path / "dump.json").write_bytes(mark + data.replace(b"\n", end))
    manifest = kb_build.build(tmp_path / "dump.json", tmp_path / "kb", config())
    assert list(read(tmp_path / "kb")) == KEPT
    assert manifest["counts"]["rejected"] == 0


def test_names_are_one_line_without_controls(tmp_path):
    odd = "\u202ea\x00b\x1b[31m\u2028c\u200d\ufeff"
    entity = item(
        "Q1", {"en": odd}, aliases={"en": [odd + "2"]}, descriptions={"en": odd}, links=EN
    )
    (tmp_path / "dump.json").write_bytes(dump([line(entity)]))
    kb_build.build(tmp_path / "dump.json", tmp_path / "kb", config())
    row = read(tmp_path / "kb")["Q1"]
    assert row["label"] == row["description"] == "a b [31m c\u200d"
    assert row["aliases"] == ["a b [31m c\u200d2"]


def test_a_line_that_is_too_long_costs_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(kb_dump, "MAX_LINE", 2000)
    monkeypatch.setattr(kb_dump, "_BLOCK", 700)
    monkeypatch.setattr(kb_dump, "_MAX_CHUNK", 3000)
    lines = [line(item(f"Q{i}", {"en": f"tea {i}"}, links=EN)) for i in range(1, 12)]
    lines[4] = lines[4][:-1] + b',"x":"' + b" " * 1_000_000 + b'"}'
    (tmp_path / "dump.json").write_bytes(dump(lines))
    sizes = [len(chunk.data) for chunk in kb_dump.chunks(str(tmp_path / "dump.json"), 100, 1)]
    assert len(sizes) > 1
    assert max(sizes) <= 3000 + 2000
    kb_build.build(tmp_path / "dump.json", tmp_path / "kb", config(chunk_lines=100))
    assert rejects(tmp_path / "kb") == [("line 6", "line_too_long")]
    assert list(read(tmp_path / "kb")) == [f"Q{i}" for i in range(1, 12) if i != 5]


def test_too_many_rejects_are_an_error_and_publish_nothing(tmp_path):
    good = line(item("Q1", {"en": "tea"}, links=EN))
    (tmp_path / "dump.json").write_bytes(dump([good, b"{", b"5", b"{"]))
    expected = r"3 of 4 lines of .*dump\.json cannot be used \(2 broken_json, the first in line 3\)"
    with pytest.raises(errors.BadInput, match=expected):
        kb_build.build(tmp_path / "dump.json", tmp_path / "kb", config())
    assert not (tmp_path / "kb/manifest.json").exists()
    assert not (tmp_path / "kb/entities.parquet").exists()
    kb_build.build(tmp_path / "dump.json", tmp_path / "kb", config(reject_budget=0.75))
    assert list(read(tmp_path / "kb")) == ["Q1"]


# ---------------------------------------------------------------------------------------- resume

SLOW = """
import sys, time
from configs import kb
from data_prep.kb import build as kb_build
from data_prep.kb.sources import wikidata
parse = wikidata.parse
def slowly(line, rules):
    time.sleep(0.02)
    return parse(line, rules)
wikidata.parse = slowly
config = kb.get_config()
config.update({"chunk_lines": 3, "workers": 1})
kb_build.build(sys.argv[1], sys.argv[2], config)
"""


def test_parts_that_are_finished_before_a_kill_are_not_parsed_again(tmp_path, monkeypatch):
    lines = [line(entity) for entity, _ in entities()]
    (tmp_path / "dump.json").write_bytes(dump(lines))
    parts = tmp_path / "kb/.parts"
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "dump.json"), str(tmp_path / "kb")]
    )
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.entities.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    done = len(list(parts.glob("*.entities.parquet")))
    assert 3 <= done < (len(lines) + 2) / 3
    (parts / "0000001.entities.parquet").write_bytes(b"PAR1 torn")

    parsed = []
    parse = wikidata.parse
    monkeypatch.setattr(
        wikidata, "parse", lambda text, rules: (parsed.append(text), parse(text, rules))[1]
    )
    resumed = kb_build.build(tmp_path / "dump.json", tmp_path / "kb", config())
    # Whole parts of three lines are left out, the bracket is in the first; the torn one is not.
    assert len(parsed) == len(lines) - (3 * done - 1) + 3
    assert not parts.exists()
    fresh = kb_build.build(tmp_path / "dump.json", tmp_path / "again/kb", config())
    digests = [[output["sha256"] for output in m["outputs"]] for m in (resumed, fresh)]
    assert digests[0] == digests[1]
    parsed.clear()
    kb_build.build(tmp_path / "dump.json", tmp_path / "kb", config())
    assert parsed == []


def test_parts_of_other_lines_or_other_rules_are_parsed_again(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    lines = [line(entity) for entity, _ in entities()]
    (tmp_path / "dump.json").write_bytes(dump(lines))
    with monkeypatch.context() as patch:
        patch.setattr(kb_build.kb_merge, "merge", stop)
        with pytest.raises(KeyboardInterrupt):
            kb_build.build(tmp_path / "dump.json", tmp_path / "kb", config())
    assert list((tmp_path / "kb/.parts").glob("*.parquet"))
    changed = [text.replace(b'"Tea"', b'"Tia"') for text in lines]
    (tmp_path / "dump.json").write_bytes(dump(changed))
    kb_build.build(tmp_path / "dump.json", tmp_path / "kb", config(need_link_or_image=False))
    found = read(tmp_path / "kb")
    assert found["Q1"]["label"] == "Tia"
    assert "Q23" in found

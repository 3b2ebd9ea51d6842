"""Anchors from a dump of Wikipedia: wikitext, redirects, titles, how often texts are seen."""

import bz2
import html

import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from data_prep import build_anchors
from data_prep.kb import build as kb_build
from data_prep.kb.sources import wikipedia, wikitext
from mofi_jax.common import errors
from tests import inputs
from tests.fuzzing import fuzz

SPACES = frozenset(("file", "image", "category", "template", "wikipedia"))


@pytest.mark.parametrize(
    ("source", "links", "text"),
    [
        ("a [[tea]] b", [("tea", "Tea")], "a tea b"),
        ("[[Green_tea|the  green\none]]", [("the green one", "Green tea")], "the  green\none"),
        ("[[bus]]es run", [("buses", "Bus")], "buses run"),
        ("[[Tea#History|''old'' tea]]", [("old tea", "Tea")], "old tea"),
        ("[[#History|below]]", [], "below"),
        ("[[Tom &amp; Jerry]]", [("Tom & Jerry", "Tom & Jerry")], "Tom & Jerry"),
        ("<!-- [[a]] --><nowiki>[[b]]</nowiki>c", [], "  c"),
        ("x<ref>[[a]]</ref><ref name=y/>[[b]]", [("b", "B")], "x  b"),
        ("{{box|{{inner|[[a]]}}|y}}z", [], "z"),
        (
            "[[File:A.jpg|thumb|a [[cat]] on a [[mat|rug]]]]!",
            [("cat", "Cat"), ("rug", "Mat")],
            "a cat on a rug!",
        ),
        ("[[Category:Teas]][[:Category:Teas|all teas]]", [], "all teas"),
        ("[[:fr:Thé]]", [("fr:Thé", "Fr:Thé")], "fr:Thé"),  # no title that any base has
        ("[[a|]] [[ ]] [[b", [("a", "A")], "a  b"),
        ("a<br/>[[b]]<sub>2</sub>", [("b", "B")], "a b2"),
        ("see [https://x.org/a the site]", [], "see  the site"),
    ],
)
def test_links_and_text_of_wikitext(source, links, text):
    assert wikitext.read(source, SPACES) == (links, text)


@fuzz(
    300,
    pieces=st.lists(
        st.sampled_from(
            ["[[", "]]", "|", "{{", "}}", "File:", "a", " ", "<ref>", "</ref>", "<!--", "'''", "#"]
        ),
        max_size=20,
    ),
)
def test_any_wikitext_is_read(pieces):
    article = wikitext.read("".join(pieces), SPACES)
    for anchor, title in article.links:
        assert anchor.strip() == anchor != ""
        assert title[0] == title[0].upper()


HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <dbname>enwiki</dbname>
    <case>first-letter</case>
    <namespaces>
      <namespace key="-1" case="first-letter">Special</namespace>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Talk</namespace>
      <namespace key="6" case="first-letter">File</namespace>
      <namespace key="14" case="first-letter">Category</namespace>
    </namespaces>
  </siteinfo>
"""


def page(title, text="", space=0, redirect=None):
    leads = f'    <redirect title="{html.escape(redirect)}" />\n' if redirect else ""
    return f"""  <page>
    <title>{html.escape(title)}</title>
    <ns>{space}</ns>
    <id>12</id>
{leads}    <revision>
      <id>1</id>
      <model>wikitext</model>
      <text bytes="{len(text)}" xml:space="preserve">{html.escape(text)}</text>
      <sha1>x</sha1>
    </revision>
  </page>
"""


PAGES = [
    page("Tea", "Tea is drunk. A [[cup]] of [[tea]]; tea leaves. [[Camellia|Tea]] grows."),
    page("Cup", "The [[Char (drink)|char]], the [[Tea]], cups and [[cup]]s, teacup. &lt;tea&gt;"),
    page("Char (drink)", redirect="Chai & co"),
    page("Chai & co", redirect="Tea"),
    page("Round", redirect="Round"),
    page("Talk:Tea", "[[tea]] " * 9, space=1),
    "  <page>\n    <title>Broken<ns>0</ns>\n  </page>\n",
    page("Nothing"),
]
ROWS = (
    '{"id": "Q1", "label": "tea", "title": "Tea"}\n{"id": "Q2", "label": "cup", "title": "Cup"}\n'
)
EXPECTED = [
    ("Chai & co", "Q1", 5, 0),
    ("Char", "Q1", 5, 0),
    ("Tea", "Q1", 1, 3),  # what links to Camellia has no entity
    ("char", "Q1", 1, 1),
    ("cup", "Q2", 1, 1),
    ("cups", "Q2", 1, 2),
    ("tea", "Q1", 1, 3),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "rows.jsonl").write_text(ROWS)
    kb_build.build(folder / "rows.jsonl", folder / "kb", inputs.kb_rules())
    return folder


def write(path, pages=PAGES, tail="</mediawiki>\n"):
    data = (HEAD + "".join(pages) + tail).encode()
    path.write_bytes(bz2.compress(data) if path.suffix == ".bz2" else data)
    return str(path)


def rows(path):
    return [tuple(row.values()) for row in pq.ParquetFile(path).read().to_pylist()]


def test_a_dump_becomes_a_table_that_a_base_is_built_with(base, tmp_path, monkeypatch):
    dump = write(tmp_path / "wiki.xml.bz2")
    build_anchors.main(dump, str(base / "kb"), str(tmp_path / "a/anchors.parquet"), workers="1")
    assert rows(tmp_path / "a/anchors.parquet") == EXPECTED
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["anchors.parquet"]
    monkeypatch.setattr(wikipedia, "_CHUNK", 1)
    monkeypatch.setattr(wikipedia.dump, "_BLOCK", 700)  # a page or two
    dump = write(tmp_path / "wiki.xml")
    build_anchors.main(dump, str(base / "kb"), str(tmp_path / "anchors.parquet"), workers="1")
    first, second = tmp_path / "a/anchors.parquet", tmp_path / "anchors.parquet"
    assert first.read_bytes() == second.read_bytes()
    config = inputs.kb_rules(anchors=str(second))
    manifest = kb_build.build(base / "rows.jsonl", tmp_path / "kb", config)
    assert manifest["counts"]["linked_names"] == 2  # the redirects


def test_what_is_read_already_is_not_read_again(base, tmp_path, monkeypatch):
    monkeypatch.setattr(wikipedia, "_CHUNK", 1)
    monkeypatch.setattr(wikipedia.dump, "_BLOCK", 700)
    dump, out = write(tmp_path / "wiki.xml"), str(tmp_path / "anchors.parquet")
    parse, done = wikipedia.Seen.parse, []

    def killed(self, chunk):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(chunk.number)
        parse(self, chunk)

    monkeypatch.setattr(wikipedia.Seen, "parse", killed)
    with pytest.raises(KeyboardInterrupt):
        build_anchors.main(dump, str(base / "kb"), out, workers="1")
    monkeypatch.setattr(wikipedia.Seen, "parse", lambda *args: (done.append(0), parse(*args)))
    monkeypatch.setattr(wikipedia.Links, "parse", None)
    build_anchors.main(dump, str(base / "kb"), out, workers="1")
    assert rows(out) == EXPECTED
    assert len(done) == len(list(wikipedia._chunks(dump, 1)))


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("wiki.xml", HEAD + PAGES[0], "without the closing tag"),
        ("wiki.xml", "<a></a>", "does not begin like"),
        ("wiki.xml.bz2", "no bzip2", "is damaged"),
        ("wiki.xml", HEAD + page("Other", "[[Thing]]") + "</mediawiki>", "no link leads to"),
        ("wiki.json", HEAD, "unknown suffix"),
        (None, None, "does not exist"),
    ],
)
def test_dumps_that_cannot_be_used_are_told(base, tmp_path, name, data, told):
    path = tmp_path / (name or "wiki.xml")
    if name:
        path.write_text(data)
    with pytest.raises(errors.BadInput, match=told):
        build_anchors.main(str(path), str(base / "kb"), str(tmp_path / "x.parquet"), workers="1")
    assert not (tmp_path / "x.parquet").exists()


@pytest.mark.parametrize(
    "changes", [{"kb": "nowhere"}, {"out": "a.tsv"}, {"workers": "0"}, {"memory_gb": "much"}]
)
def test_arguments_that_cannot_be_used_are_told(base, tmp_path, changes):
    dump = write(tmp_path / "wiki.xml")
    arguments = {"dump": dump, "kb": str(base / "kb"), "out": str(tmp_path / "a.parquet")}
    [name] = changes
    with pytest.raises(errors.BadInput, match=f"--{name}="):
        build_anchors.main(**(arguments | changes))

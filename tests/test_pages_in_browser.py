"""Pages as a browser shows them: on a phone and a desktop, light and dark."""

import itertools
import json
import os

import matplotlib as mpl
import numpy as np
import pytest
from etils import epath

from data_prep.card import page as card_page
from mofi_jax import curves, search, serve, sweep
from mofi_jax.common.pages import page, plots
from mofi_jax.data import ops
from mofi_jax.interop.onnx import web
from mofi_jax.search import __main__ as search_main
from quickstart import report
from tests import browser, test_evaluation_pages, test_quickstart, test_report

pytestmark = pytest.mark.skipif(
    browser.path() is None, reason=f"no browser is installed: none of {', '.join(browser.NAMES)}"
)

# As long as words get, with what strangers put into names.
NAME = "Pneumonoultramicroscopicsilicovolcanoconiosis <b>of</b> Llanfairpwllgwyngyllgogerychwyrn"
JPEG = search_main.thumbnail(ops.encode_jpeg(np.full((60, 80, 3), 200, np.uint8), 90))

# Sentences on what one cannot read: what reaches beyond the page, what is cut off, what lies over
# other words, and what is hardly another colour than its background (WCAG 2: contrast below 4.5).
FAULTS = """(() => {
  const found = [], wide = document.documentElement.clientWidth;
  for (const details of document.querySelectorAll("details")) details.open = true;
  const name = of => of.tagName + "." + of.getAttribute("class") + " " +
    (of.textContent || "").trim().slice(0, 40);
  if (document.documentElement.scrollWidth > wide) {
    const range = document.createRange(), texts = document.createTreeWalker(document.body, 4);
    let widest = 0, words = "";
    while (texts.nextNode()) {
      range.selectNodeContents(texts.currentNode);
      const right = range.getBoundingClientRect().right;
      if (right > widest) [widest, words] = [right, texts.currentNode.textContent.trim()];
    }
    found.push("the page scrolls sideways, as far as: " + words.slice(0, 60));
  }
  const colour = text => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const over = (top, bottom) => top.rgb.map((v, i) => v * top.a + bottom[i] * (1 - top.a));
  const light = rgb => rgb.map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = of => {
    const layers = [];
    for (let node = of; node; node = node.parentElement)
      layers.push(colour(getComputedStyle(node).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  for (const of of document.body.querySelectorAll("*")) {
    const style = getComputedStyle(of), box = of.getBoundingClientRect();
    if (!box.width || !box.height || style.visibility === "hidden") continue;
    if (["SCRIPT", "STYLE", "TITLE"].includes(of.tagName.toUpperCase())) continue;
    const drawn = of.closest("svg");
    // What scrolls within the page is reached.
    let held = of.parentElement;
    while (held && !/auto|scroll/.test(getComputedStyle(held).overflowX)) held = held.parentElement;
    if (!held && (box.left < -1 || box.right > wide + 1))
      found.push("beyond the page: " + name(of));
    const more = of.scrollWidth > of.clientWidth + 1 || of.scrollHeight > of.clientHeight + 1;
    if (!drawn && more && /hidden|clip/.test(style.overflow) && of.tagName !== "INPUT")
      found.push("cut off: " + name(of));
    const own = [...of.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own) continue;
    const text = colour(drawn ? style.fill : style.color), back = behind(of);
    const [dark, bright] = [light(over(text, back)), light(back)].sort((a, b) => a - b);
    if ((bright + 0.05) / (dark + 0.05) < 4.5)
      found.push("hardly to be read: " + name(of) + " " + JSON.stringify([text, back]));
    if (drawn) {
      const frame = drawn.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 ||
          box.bottom > frame.bottom + 1) found.push("beyond its drawing: " + name(of));
    }
  }
  for (const drawing of document.querySelectorAll("svg")) {
    const boxes = [...drawing.querySelectorAll("text")].filter(of => of.textContent.trim())
      .map(of => [of, of.getBoundingClientRect()]);
    boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
          Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
        found.push("one over the other: " + name(one) + " | " + name(other));
    }));
  }
  return found;
})()"""


def card():
    """The data card of names that are long, with every chart."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 2_000_000, 24).tolist()
    doubling = [{"from": 2**i, "to": 2 ** (i + 1) - 1} for i in range(24)]
    values = np.arange(0, 1, 0.05).round(2).tolist()
    bins = [{"from": v, "chosen": 900 * (v >= 0.25), "others": 700 * (v < 0.25)} for v in values]
    points = [
        {"value": v, "pictures": 1_595_000 * (1 - v), "entities": 900 * (1 - v)} for v in values
    ]
    points = [{**point, "configured": point["value"] == 0.25} for point in points]
    changes = {
        "images_per_entity": {
            "bins": [
                {**b, "entities": n, "labels": n, "share": 0.5}
                for b, n in zip(doubling, counts, strict=True)
            ],
            "head": [{"part": 0.01, "entities": 123_456, "share": 0.5}],
        },
        "picture_sizes": {
            "median": 512,
            "bins": [{**b, "pictures": n} for b, n in zip(doubling[5:9], counts, strict=False)],
        },
        "labels_per_picture": {"1": 1_202_000, "2": 35, "3": 12_345_678},
        "probabilities": {"threshold": 0.25, "bins": bins},
        "sensitivity": {"min_probability": points},
    }
    report = test_report.example(NAME, **changes)
    report["config"] |= {"min_probability": 0.25, "target_precision": None, "label_kinds": []}
    for group in ("changed", "rejected"):
        picture = {
            **report["gallery"][0],
            "group": group,
            "reason": "rejected" if group == "rejected" else None,
        }
        rows = [
            {**picture["candidates"][0], "chosen": chosen, "by_text": not chosen}
            for chosen in (True, False)
        ]
        report["gallery"] += [{**picture, "candidates": rows}] * 5
    for picture in report["gallery"]:
        for row in picture["candidates"]:
            row |= {"z_score": -12.25, "shown": 0.5}
    return card_page.render(report, {NAME: JPEG})


def quick_start(folder):
    (folder / "multitask").mkdir()
    names = ("loss_entity", "loss_contrastive", "retrieval_seen/map", "retrieval_unseen/map")
    steps = [{"step": i, **dict.fromkeys(names, 8.45 / (i + 1))} for i in range(0, 850, 50)]
    (folder / "multitask/metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    stage = {"seconds": 61.0, "peak_rss_mb": 2345, "command": ["train", f"--config={'x' * 90}"]}
    good = test_quickstart.result(test_quickstart.row(0.6, 0.4), {"precision": 0.6, "recall": 0.7})
    more = {"scores": {"entity_seen/top5": 0.9}, "seconds": 90, "peak_rss_mb": 2345}
    stages = {"stages": {"contrastive_alt_text": stage}, "shortfalls": [NAME]}
    return report.page({**good, **more, **stages}, folder)


def drawn_curves(count):
    steps = range(0, 85_000, 1000)
    names = (
        "loss",
        "loss_entity",
        "learning_rate",
        "gradient_norm",
        f"{'retrieval_' * 4}/map_no_self",
    )
    runs = [
        curves.Run(
            f"{NAME} {r}",
            [{"step": i, **dict.fromkeys(names, 10.0 ** (-i / 30000.0) + r)} for i in steps],
        )
        for r in range(count)
    ]
    with mpl.rc_context(plots.STYLE):
        return curves.page(runs)


def swept(folder):
    points = [
        {"optimizer.learning_rate": rate, "data.train_ops": NAME, "margin": i / 10}
        for i, rate in enumerate((1e-4, 3e-4, 1e-3, 3e-3, 1e-2))
    ]
    names = [f"{i:03d}" for i in range(len(points))]
    for i, name in enumerate(names[:4]):
        (folder / name).mkdir()
        result = {"scores": {"unseen/map": 0.3 + i / 50}, "steps": 1, "seconds": 1.0}
        (folder / name / "result.json").write_text(json.dumps(result))
    sweep.write_table(epath.Path(folder), names, points, "unseen/map")
    return (folder / "index.html").read_text()


def template(module):
    return os.path.join(os.path.dirname(module.__file__), "page.html.j2")


def found(folder):
    near = [search_main.Found(i, 0.5, f"{NAME}/" * 3, NAME) for i in range(5)]
    queries = [search_main.Query(NAME, JPEG, near), search_main.Query(NAME, None, near[:1])]
    values = {"queries": queries, "thumbnails": {0: JPEG, 1: JPEG}, "pictures": 10**6}
    return page.fill(template(search), {**values, "images": f"/{NAME}" * 2, "model": NAME})


def served():
    values = {"nonce": "x", "model": NAME, "pictures": 10**6, "entities": 10**6, "reads": True}
    near = [{"row": i, "cosine": -0.5, "key": f"{NAME}/" * 2} for i in range(5)]
    entity = {"qid": "Q144", "name": NAME, "description": NAME, "score": 0.5}
    shown = f"<script>show({json.dumps({'neighbours': near, 'entities': [entity]})})</script>"
    return page.fill(template(serve), values).replace("</main>", f"</main>{shown}")


def in_browser():
    values = {"words": [NAME], "runtime": "", "entities": {"names": "", "table": ""}}
    values |= dict.fromkeys(("image", "text", "padding", "vision_class", "text_class"), "")
    return page.fill(os.path.join(os.path.dirname(web.__file__), "web.html.j2"), values)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """All pages as files, by name."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("set", "quick", "sweep"):
        (folder / name).mkdir()
    texts = {
        "data card": card(),
        "quick start": quick_start(folder / "quick"),
        "evaluation": test_evaluation_pages.render(folder / "set"),
        "curves of a run": drawn_curves(1),
        "curves of nine": drawn_curves(9),
        "sweep": swept(folder / "sweep"),
        "search": found(folder),
        "served": served(),
        "model in the browser": in_browser(),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in texts}


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.started(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def test_all_is_on_the_pages_and_can_be_read(tab, addresses):
    faults = {}
    for name, address in addresses.items():
        tab.open(address)
        for width, dark in itertools.product((390, 1440), (False, True)):
            tab.look(width, dark)
            assert tab.ask("innerWidth") == width
            assert tab.ask("matchMedia('(prefers-color-scheme: dark)').matches") == dark
            if of := tab.ask(FAULTS):
                faults[f"{name}, {width} pixels, {'dark' if dark else 'light'}"] = of[:8]
    assert not faults, json.dumps(faults, indent=1, ensure_ascii=False)


def test_the_question_finds_faults(tab, tmp_path):
    tab.look(390, False)
    bad = """<body style="margin: 0; background: #fff"><p style="color: #999">pale</p>
      <div style="width: 500px">wide</div>
      <div style="overflow: hidden; height: 9px">cut<br>off</div>
      <svg viewBox="0 0 100 20"><text x="90" y="15">beyond</text><text x="92" y="16">over</text>
      </svg>"""
    (tmp_path / "bad.html").write_text(bad)
    tab.open((tmp_path / "bad.html").as_uri())
    faults = " ".join(tab.ask(FAULTS))
    for words in ("sideways", "hardly", "beyond the page", "cut off", "its drawing", "one over"):
        assert words in faults, faults

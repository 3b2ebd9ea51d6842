"""The page that runs a model in a browser, in a browser."""

import dataclasses
import functools
import http.server
import json
import os
import queue
import shutil
import signal
import subprocess
import threading

import cv2
import jax
import numpy as np
import pytest

import mofi_jax
from data_prep.dataset import files as dataset_files
from mofi_jax import export
from mofi_jax.common import errors
from mofi_jax.data import records
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import huggingface, parity
from mofi_jax.interop.onnx import folder as folder_lib
from mofi_jax.interop.onnx import web
from mofi_jax.model import mofi

CHROMIUM = shutil.which("chromium")
ready = (folder_lib.EXPORTER / "jax2onnx").is_dir() and web.PACKAGES.is_dir() and CHROMIUM

# Does what a person does with the page, and posts what the page says.
VISITOR = """<!doctype html><meta charset="utf-8"><iframe src="index.html"></iframe>
<script type="module">
const frame = document.querySelector("iframe");
await new Promise((done) => frame.addEventListener("load", done));
const page = frame.contentDocument;
const status = () => page.getElementById("status").textContent;
async function until(condition) {
  while (!condition()) await new Promise((done) => setTimeout(done, 20));
}
async function drop(name) {
  const files = new DataTransfer();
  files.items.add(new File([await (await fetch(name)).blob()], name, { type: "image/png" }));
  const options = { dataTransfer: files, bubbles: true, cancelable: true };
  page.getElementById("drop").dispatchEvent(new frame.contentWindow.DragEvent("drop", options));
}
function rows(id = "cosines") {
  return [...page.querySelectorAll(`#${id} li`)].map(
    (li) => [li.querySelector("span").textContent, Number(li.querySelector("b").textContent)]);
}
await until(() => !status().startsWith("Loading"));
const found = { loaded: status() };
await drop("index.html");
await until(() => status().startsWith("This did not work"));
found.refused = status();
await drop("picture.png");
await until(() => rows().length);
found.first = rows();
found.entities = rows("entities");
const words = page.getElementById("words");
words.value = "dogs <b>in</b> the snow\\n\\n a ";
words.dispatchEvent(new Event("input"));
await until(() => rows().length === 2);
found.typed = rows();
await fetch("found", { method: "POST", body: JSON.stringify(found) });
</script>"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    dataset_files.train_bpe(["a photo of a cat", "dogs in the snow"] * 3, 280, path)
    tokenizer = tokenizer_lib.Tokenizer(path, 32)
    config = mofi.MofiConfig(
        image_size=16,
        patch_size=8,
        image=mofi.TowerConfig(16, 1, 2),
        text=mofi.TowerConfig(24, 1, 2),
        vocab_size=tokenizer.vocab_size,
        context_length=32,
        eos_id=tokenizer.eos_id,
        embed_dim=8,
    )
    shapes = jax.eval_shape(lambda key: mofi.create(config, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0.1, 0.4, x.shape).astype(np.float32), shapes)
    params["entity_table"] = rng.normal(0, 2, (7, 8)).astype(np.float32)
    names = [f"<i>{i}</i>" for i in range(7)]
    known = records.Entities([f"Q{i}" for i in range(7)], names, ["", *"abcdef"], np.ones(7, int))
    return huggingface.Clip(config, params, tokenizer, known, "decode|resize(16)")


@pytest.mark.slow
@pytest.mark.skipif(not ready, reason="needs chromium, jax2onnx and the npm packages of web.py")
def test_in_a_browser_without_network(clip, tmp_path):
    report = export.export(clip, tmp_path, "web")
    assert report["reader"] == ["onnxruntime"]
    picture = np.random.default_rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "picture.png"), picture[..., ::-1])
    (tmp_path / "visitor.html").write_text(VISITOR)
    found = _visit(tmp_path, "visitor.html")

    assert found["loaded"] == "Ready: drop a picture."

    def check(rows, texts):
        ours = parity.embedder(clip)(picture[None], texts)
        cosines = dict(zip(texts, ours["text"] @ ours["image"][0], strict=True))
        assert [name for name, _ in rows] == sorted(texts, key=cosines.get, reverse=True)
        np.testing.assert_allclose(
            [value for _, value in rows], sorted(cosines.values())[::-1], atol=2e-4
        )

    check(found["first"], web.WORDS)
    check(found["typed"], ("dogs <b>in</b> the snow", "a"))
    huggingface.write(tmp_path / "hf", clip)
    named = mofi_jax.load(tmp_path / "hf").name_entities(picture, 5)[0]
    names = [f"{e.name}, {e.description}" if e.description else e.name for e in named]
    assert [name for name, _ in found["entities"]] == names
    scores = [entity.score for entity in named]
    np.testing.assert_allclose([x for _, x in found["entities"]], scores, rtol=0, atol=2e-4)


def _visit(folder, name):
    """What a page of the folder posts, in a browser that reaches nothing but this folder."""
    posted = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self):
            posted.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = subprocess.Popen(
            [
                *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu"),
                *("--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}"),
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                f"http://127.0.0.1:{server.server_port}/{name}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return posted.get(timeout=100)
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            server.shutdown()


def test_npm_packages(clip, tmp_path, monkeypatch):
    """Missing, and damaged: the command that fetches them is named, and nothing is written."""
    monkeypatch.setattr(web, "PACKAGES", tmp_path)
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(errors.BadInput, match="npm pack --pack-destination") as raised:
            web.write(out, clip)
        assert "@huggingface/transformers@4." in str(raised.value)
        assert not out.exists()
        (tmp_path / "huggingface-transformers-4.3.2.tgz").write_bytes(b"\x1f\x8b half a download")


def test_a_model_without_texts(clip, tmp_path):
    clip = dataclasses.replace(clip, params={"image": clip.params["image"]}, tokenizer=None)
    with pytest.raises(errors.BadInput, match="this model has no text tower"):
        web.write(tmp_path / "out", clip)

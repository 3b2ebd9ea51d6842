"""The page of a model: what it answers, and what nobody can make it do."""

import asyncio
import concurrent.futures
import contextlib
import shutil
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

import mofi_jax
from mofi_jax import embed
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.inference.index import Index
from mofi_jax.serve import app
from tests import datasets

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def drawing(entity, i=0, size=48):
    rgb = datasets.drawing(entity, i)
    return ops.encode_jpeg(np.asarray(rgb), 95)


@pytest.fixture(scope="module")
def found(trained, tmp_path_factory):
    """A model and the folder of embeddings of 21 pictures, three of each of its entities."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "pictures").mkdir()
    for entity in range(7):
        for i in range(3):
            name = f"<b>{entity}</b> [{i}].jpg"
            (folder / "pictures" / name.replace("/", "_")).write_bytes(drawing(entity, 50 + i))
    embed.main(str(trained / "run"), str(folder / "pictures"), str(folder / "e"))
    return trained / "run", folder / "e"


@pytest.fixture(scope="module")
def client(found):
    model, embeddings = found
    served = app.create(mofi_jax.load(model, batch_size=1), Index.open(embeddings))
    return TestClient(served, base_url="http://localhost", raise_server_exceptions=False)


def test_a_picture_finds_itself_and_its_entities(client):
    answer = client.post("/search/picture", content=drawing(3, 51)).json()
    first = answer["neighbours"][0]
    assert first["key"].startswith("<b>3<_b> [1]")
    assert first["cosine"] == pytest.approx(1, abs=1e-3)
    assert len(answer["neighbours"]) == 21
    assert len(answer["entities"]) == 5
    assert set(answer["entities"][0]) == {"qid", "name", "description", "score"}
    again = client.post(f"/search/row/{first['row']}").json()
    assert again["neighbours"][0]["row"] == first["row"]
    shown = client.get(f"/picture/{first['row']}")
    assert shown.headers["content-type"] == "image/jpeg"
    assert ops.decode_rgb(shown.content).shape[2] == 3


def test_words_find_pictures(client):
    answer = client.post("/search/text", content="a drawing").json()
    assert len(answer["neighbours"]) == 21
    assert answer["entities"] == []


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/search/picture", b"", 422, "no picture"),
        ("/search/picture", b"<script>alert(1)</script>" * 10, 422, "no picture"),
        ("/search/picture", b"\xff" * (app.MAX_BYTES + 1), 413, "At most"),
        ("/search/text", b"  \n", 422, "1 to 2000 characters"),
        ("/search/text", b"x" * (app.MAX_TEXT + 1), 422, "1 to 2000 characters"),
        ("/search/text", b"x" * (5 * app.MAX_TEXT), 413, "At most"),
        ("/search/row/21", b"", 404, "no such picture"),
        ("/search/row/-1", b"", 404, "no such picture"),
        ("/search/row/..", b"", 404, ""),
    ],
)
def test_bad_questions_get_a_sentence(client, path, body, status, words):
    answer = client.post(path, content=body)
    assert answer.status_code == status
    assert words in answer.text
    assert "Traceback" not in answer.text


def test_a_picture_bomb_is_refused(client):
    # The header of 60,000 x 60,000 pixels.
    header = (
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\xea\x60\x00\x00\xea\x60\x08\x02\x00\x00\x00"
    )
    answer = client.post("/search/picture", content=header + b"\x00" * 100)
    assert answer.status_code == 422


def test_who_leaves_in_the_middle_of_an_upload_is_no_error(client):
    messages = iter(
        [
            {"type": "http.request", "body": b"half of", "more_body": True},
            {"type": "http.disconnect"},
        ]
    )
    sent = []

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/search/picture", "query_string": b""}
    scope |= {"headers": [(b"host", b"localhost")], "http_version": "1.1"}
    asyncio.run(client.app(scope, receive, send))  # raises what a server would print
    assert sent[0]["status"] == 499


def test_nothing_of_the_machine_can_be_asked_for(client):
    for path in ("/picture/..%2f..%2fetc%2fpasswd", "/../etc/passwd", "/picture/etc", "/static/x"):
        assert client.get(path).status_code in (404, 422)
    # Under another name, as a page that rebinds its own to this machine would.
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    for method, path in (("GET", "/openapi.json"), ("GET", "/docs"), ("DELETE", "/picture/0")):
        assert client.request(method, path).status_code in (404, 405)


def test_an_index_of_another_model_is_refused(found, tmp_path, monkeypatch, caplog):
    model, index = mofi_jax.load(found[0], batch_size=1), Index.open(found[1])
    inner = mofi_jax.inference.Model.embed_images
    for change in (lambda v: -v, lambda v: np.pad(v, ((0, 0), (0, 3)))):
        with monkeypatch.context() as patch:
            patch.setattr(
                mofi_jax.inference.Model,
                "embed_images",
                lambda self, x, f=change: f(inner(self, x)),
            )
            with pytest.raises(BadInput, match="is not the model that made"):
                app.create(model, index)
    # Where the pictures are gone nothing can be told by them, and the page works without.
    app.create(model, Index.open(found[1], images=tmp_path))
    assert "--images" in caplog.text


def test_a_hundred_questions_at_once(client):
    bodies = [drawing(i % 7, 50 + i % 3) for i in range(100)]
    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda b: client.post("/search/picture", content=b), bodies))
    assert {answer.status_code for answer in answers} == {200}
    for i, answer in enumerate(answers):
        assert answer.json()["neighbours"][0]["key"].startswith(f"<b>{i % 7}<_b> [{i % 3}]")


@contextlib.contextmanager
def served(found):
    """The command itself; yields its address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    model, embeddings = found
    command = [sys.executable, "-m", "mofi_jax.serve", f"--model={model}"]
    command += [f"--embeddings={embeddings}", f"--port={port}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if "http://" in line:
                break
        for _ in range(100):
            with contextlib.suppress(httpx.ConnectError):
                httpx.get(f"http://127.0.0.1:{port}/")
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_what_is_found(found, tmp_path):
    with served(found) as address:
        for question in ("?row=4", "?text=a+drawing"):
            options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
            options += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=10000"]
            command = [CHROMIUM, *options, f"{address}/{question}"]
            run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            assert run.stdout.count('src="picture/') >= 21, run.stdout[-2000:]
            # Names of files are words on the page, never part of it.
            assert "&lt;b&gt;" in run.stdout
            assert 'id="error" role="alert"></p>' in run.stdout

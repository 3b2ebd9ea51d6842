"""Names of the Hugging Face hub; what answers for it is a folder, as no hub can be reached here."""

import errno
import os
import shutil
import sys
import unittest.mock

import ml_collections
import pytest

from data_prep import build_i2e, class_folders
from data_prep.pairs import files as source_files
from data_prep.pairs import stage as pairs_stage
from mofi_jax import evaluate, inference
from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators.sets import pictures as picture_sets
from mofi_jax.interop import from_hub
from tests.inputs import make_config, picture, tar_bytes

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """What lies in KIND/OWNER/NAME of this folder is on the hub; the cache is one of links."""
    import fnmatch

    import huggingface_hub
    from huggingface_hub import errors

    asked = []

    def made(kind):  # they are made of answers of an HTTP client
        return kind.__new__(kind)

    def download(name, *, repo_type, revision=None, allow_patterns=("*",), ignore_patterns=()):
        asked.append((repo_type, name, revision))
        at = tmp_path / "hub" / f"{repo_type}s" / name
        if not at.is_dir():
            raise made(errors.RepositoryNotFoundError)
        if revision not in (None, "main", COMMIT):
            raise made(errors.RevisionNotFoundError)
        cache = tmp_path / "cache" / f"{repo_type}s--{name.replace('/', '--')}"
        folder = cache / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        for path in filter(os.path.isfile, at.rglob("*")):
            inside = str(path.relative_to(at))
            wanted = any(fnmatch.fnmatch(inside, pattern) for pattern in allow_patterns)
            if not wanted or any(fnmatch.fnmatch(inside, pattern) for pattern in ignore_patterns):
                continue
            blob, link = cache / "blobs" / inside.replace("/", "-"), folder / inside
            if not link.exists():
                blob.parent.mkdir(exist_ok=True)
                link.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, blob)
                link.symlink_to(blob)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(from_hub, "_FETCHED", {})
    from_hub.fetch.cache_clear()
    yield tmp_path / "hub", asked
    from_hub.fetch.cache_clear()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_pairs_by_name_and_the_commit_they_are_of(hub_folder, tmp_path):
    root, asked = hub_folder
    for name in ("a", "b"):
        put(root / f"datasets/me/pairs/en/{name}.png", picture())
        put(root / f"datasets/me/pairs/en/{name}.txt", b"words")
    put(root / "datasets/me/pairs/0.tar", tar_bytes([("c.png", picture()), ("c.txt", b"words")]))
    config = make_config("hf:me/pairs", dataset="i2t")
    [tar, folder] = pairs_stage.find(config.sources)
    assert (tar.prefix, folder.prefix) == ("", "en/")
    assert asked == [("dataset", "me/pairs", None)]
    [folder] = pairs_stage.find([f"s=hf://datasets/me/pairs@{COMMIT}/en"])
    assert folder.path.endswith(f"{COMMIT}/en")
    names = ("hf:me/pairs", f"hf://datasets/me/pairs@{COMMIT}/en")
    assert from_hub.revisions() == dict.fromkeys(sorted(names), COMMIT)
    assert source_files.shorthand("hf:me/pairs@main/en+x@hf:me/b") == (
        "en=hf:me/pairs@main/en",
        "x=hf:me/b",
    )
    with pytest.raises(BadInput, match="hf:me/pairs/de has no de in it"):
        pairs_stage.find(["s=hf:me/pairs/de"])


@pytest.mark.slow
def test_the_result_says_which_commit_it_is_of(hub_folder, tmp_path):
    from configs import i2e

    root, _ = hub_folder
    members = []
    for i in range(3):
        members += [(f"{i}.png", picture(40 + i)), (f"{i}.txt", f"a red apple {i}".encode())]
    put(root / "datasets/me/pairs/0.tar", tar_bytes(members))
    config = i2e.get_config("folder=hf:me/pairs,dataset=i2t")
    config.workers = 1
    result = build_i2e.build(config, str(tmp_path / "w"))
    assert result["revisions"] == {"hf:me/pairs": COMMIT}


def test_classes_by_name(hub_folder, tmp_path):
    root, _ = hub_folder
    for path in ("train/cat/1", "train/dog/2", "val/cat/3", "val/dog/4"):
        put(root / f"datasets/me/classes/{path}.png", picture())
    class_folders.main("hf:me/classes", str(tmp_path / "out"))
    assert COMMIT in (tmp_path / "out/result.json").read_text()
    pictures = picture_sets.read_set("hf:me/classes")
    assert pictures.origin == {"part": "val", "revision": COMMIT}


def test_models_by_name_where_nothing_of_it_is_here(hub_folder, tmp_path, monkeypatch):
    root, asked = hub_folder
    monkeypatch.chdir(tmp_path)
    put(root / "models/me/clip/config.json", b"{}")
    put(root / "models/me/clip/pytorch_model.bin", b"?")
    for name in ("config.json", "pytorch_model.bin"):
        put(root / "models/me/two/inner" / name, b"{}")
    put(root / "models/me/two/model.safetensors", b"?")
    put(root / "models/me/safe/config.json", b"{}")
    put(root / "models/me/safe/model.safetensors", b"?")
    put(root / "models/me/safe/pytorch_model.bin", b"?")
    assert inference.kind("hf:me/clip") == "clip"
    assert inference.kind("hf:me/safe") == "clip"
    assert [sorted(os.listdir(from_hub.model(f"hf:me/{name}"))) for name in ("clip", "safe")] == [
        ["config.json", "pytorch_model.bin"],  # for want of anything safer
        ["config.json", "model.safetensors"],
    ]
    assert sorted(os.listdir(from_hub.model("hf:me/two/inner"))) == [
        *("config.json", "pytorch_model.bin")
    ]
    # Of a folder that is here nobody is asked.
    (tmp_path / "me/here").mkdir(parents=True)
    before = len(asked)
    with pytest.raises(BadInput, match="me/here is neither a training run"):
        inference.kind("me/here")
    # What is no address is a path, and a mistyped one asks nobody.
    assert [from_hub.model(name) for name in ("/no/such", "me/clip")] == ["/no/such", "me/clip"]
    assert len(asked) == before
    with pytest.raises(BadInput, match="--out is missing: a model of the hub needs"):
        evaluate.main(ml_collections.ConfigDict(), model="hf:me/clip")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:me/none", "hf:me/none is not among the hub's models, .*correct the name"),
        ("hf:me/none", "hf:me/none is not among the hub"),
        ("hf:me/clip@old", "correct the revision, or show who you are"),
        ("hf://datasets/me/clip", r"is no address of models: write hf:OWNER/NAME or hf://OWNER"),
        ("hf:clip", "is no address of models"),
        ("hf:me/clip/../../secret", "is no address of models"),
        ("hf:me/clip//etc", "is no address of models"),
    ],
)
def test_names_that_cannot_be_used_are_told(hub_folder, name, words):
    put(hub_folder[0] / "models/me/clip/config.json", b"{}")
    with pytest.raises(BadInput, match=words):
        from_hub.model(name)


def test_without_a_network_or_the_library_the_remedy_is_told(hub_folder, monkeypatch):
    import huggingface_hub

    def away(*args, **options):
        raise ConnectionError("[Errno 111] Connection refused\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", away)
    with pytest.raises(BadInput, match=r"\(\[Errno 111\] Connection refused\): connect .* FOLDER"):
        from_hub.data("hf:me/pairs")
    full = OSError(errno.ENOSPC, "No space left on device", "/cache/blob")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unittest.mock.Mock(side_effect=full))
    with pytest.raises(BadInput, match=r"\(no space left on device at /cache/blob\): make room"):
        from_hub.data("hf:me/pairs")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match=r"needs huggingface_hub: pip install .*--repo-type dataset"):
        from_hub.data("hf:me/pairs")

"""Publishing: a copy that is whole or not to be seen, and no byte copied twice."""

import hashlib
import shutil
import subprocess

import ml_collections
import pytest

from data_prep import engine
from data_prep.dataset import publish
from mofi_jax.common import errors
from mofi_jax.data import records
from tests import datasets


@pytest.fixture
def work(tmp_path):
    datasets.write(tmp_path / "w")
    return engine.Engine(tmp_path / "w")


def run(work, target):
    return publish.run(ml_collections.ConfigDict({"publish": str(target)}), work, "i2e")


def contents(folder):
    files = (path for path in folder.iterdir() if path.name != publish.SUMS_FILE)
    return {path.name: path.read_bytes() for path in files}


def test_a_copy_opens_by_name_and_is_not_made_twice(work, tmp_path):
    source = work.workdir / "i2e" / records.VERSION
    counts = run(work, tmp_path / "out")
    target = tmp_path / "out/i2e" / records.VERSION
    assert contents(target) == contents(source)
    size = sum(len(data) for data in contents(source).values())
    assert counts == {"files": len(contents(source)), "copied": counts["files"], "bytes": size} | {
        "deleted": 0
    }
    assert len(records.open_source(tmp_path / "out", "i2e")) == 48
    checked = subprocess.run(["sha256sum", "-c", publish.SUMS_FILE], cwd=target, check=False)
    assert checked.returncode == 0
    assert run(work, tmp_path / "out")["copied"] == 0


@pytest.mark.parametrize("same_size", [False, True])
def test_what_has_changed_is_copied_again_and_the_metadata_with_it(work, tmp_path, same_size):
    run(work, tmp_path / "out")
    source, target = (
        folder / "i2e" / records.VERSION for folder in (work.workdir, tmp_path / "out")
    )
    tokenizer = (source / records.TOKENIZER_FILE).read_bytes()
    changed = tokenizer[:-1] + b" " if same_size else tokenizer + b"\n"
    (source / records.TOKENIZER_FILE).write_bytes(changed)
    assert run(work, tmp_path / "out")["copied"] == 2
    assert contents(target) == contents(source)


def test_a_copy_that_was_stopped_is_no_data_set_and_goes_on_where_it_was(
    work, tmp_path, monkeypatch
):
    copied, copy = [], publish._copy
    monkeypatch.setattr(publish, "_STREAMS", 1)

    def copy_two(source, target):
        if len(copied) == 2:
            target.write_bytes(source.read_bytes()[:10])
            raise KeyboardInterrupt
        copied.append(source.name)
        copy(source, target)

    monkeypatch.setattr(publish, "_copy", copy_two)
    with pytest.raises(KeyboardInterrupt):
        run(work, tmp_path / "out")
    with pytest.raises(errors.BadInput, match="holds no finished version"):
        records.open_source(tmp_path / "out", "i2e")
    monkeypatch.setattr(publish, "_copy", copy)
    counts = run(work, tmp_path / "out")
    assert counts["copied"] == counts["files"] - 2
    assert len(records.open_source(tmp_path / "out", "i2e")) == 48
    assert not list((work.workdir / "publish-i2e").iterdir())


def test_a_version_is_mirrored_and_its_checksums_are_written_once(work, tmp_path, monkeypatch):
    run(work, tmp_path / "out")
    source, target = (
        folder / "i2e" / records.VERSION for folder in (work.workdir, tmp_path / "out")
    )
    (target / "i2e-train.array_record-00009-of-00010").write_bytes(b"a removed picture")
    (source / records.TOKENIZER_FILE).write_text("{}")
    written, sums_text = [], publish._sums_text
    monkeypatch.setattr(
        publish, "_sums_text", lambda sums: written.append(len(sums)) or sums_text(sums)
    )
    counts = run(work, tmp_path / "out")
    assert (counts["copied"], counts["deleted"]) == (2, 1)
    assert contents(target) == contents(source)
    files = len(contents(source))
    assert written == [files - 2, 1, files]  # the journal, the file that arrived, and all of them
    checked = subprocess.run(["sha256sum", "-c", publish.SUMS_FILE], cwd=target, check=False)
    assert checked.returncode == 0


def test_checksums_come_from_the_manifests_where_a_stage_wrote_the_file(work, tmp_path):
    version = f"i2e/{records.VERSION}"
    data = (work.workdir / version / records.TOKENIZER_FILE).read_bytes()
    [manifest] = work.map_shards(
        "metadata-i2e", _write_tokenizer, [engine.Task("all", ())], {"data": data.decode()}
    )
    digest = hashlib.sha256(data).hexdigest()
    assert manifest["outputs"][0]["sha256"] == digest
    assert publish._known_sums(work.workdir, "i2e") == {records.TOKENIZER_FILE: digest}
    run(work, tmp_path / "out")
    assert digest in (tmp_path / "out" / version / publish.SUMS_FILE).read_text()


def _write_tokenizer(task, outputs, settings):
    path = outputs.path(f"i2e/{records.VERSION}/{records.TOKENIZER_FILE}")
    path.write_text(settings["data"])
    return {}


def test_places_that_cannot_be_used_are_told(work, tmp_path):
    with pytest.raises(errors.BadInput, match="begins with gs://, s3:// or az://"):
        run(work, "ftp://host/x")
    with pytest.raises(errors.BadInput, match="is where the data set was made"):
        run(work, work.workdir)
    shutil.rmtree(work.workdir / "i2e")
    with pytest.raises(errors.BadInput, match="holds no finished data set"):
        run(work, tmp_path / "out")


def test_a_library_that_is_missing_is_named(monkeypatch):
    def missing(path):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(publish.epath.Path("s3://bucket").__class__, "exists", missing)
    with pytest.raises(errors.BadInput, match=r"needs a library .*: run pip install s3fs"):
        publish.check("s3://bucket")


def test_a_place_that_cannot_be_reached_is_told(monkeypatch):
    def unreachable(path):
        raise RuntimeError("401 Unauthorized.\nlong story")

    monkeypatch.setattr(publish.epath.Path("gs://bucket").__class__, "exists", unreachable)
    with pytest.raises(errors.BadInput, match=r"reached \(401 Unauthorized\): check the address"):
        publish.check("gs://bucket")


def test_a_line_that_breaks_while_copying_is_one_sentence(work, tmp_path, monkeypatch):
    def broken(source, target):
        raise ConnectionError("the other side hung up.\nlong story")

    with monkeypatch.context() as patch:
        patch.setattr(publish, "_copy", broken)
        said = r"copying stopped \(the other side hung up\): run the same command again"
        with pytest.raises(errors.BadInput, match=said):
            run(work, tmp_path / "out")
    assert run(work, tmp_path / "out")["copied"] > 4


def test_other_versions_there_are_named_where_something_was_removed(work, tmp_path, caplog):
    run(work, tmp_path / "out")
    (tmp_path / "out/i2e/0.9.0").mkdir()
    run(work, tmp_path / "out")
    assert "another version" not in caplog.text
    (work.workdir / "removed").mkdir()
    (work.workdir / "removed/removed.txt").write_text("a\n")
    run(work, tmp_path / "out")
    assert f"{tmp_path / 'out/i2e/0.9.0'} is another version" in caplog.text

"""Data preparation from end to end: bytes that depend on nothing but the input, and bad input."""

import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pyarrow.parquet as pq
import pytest

from benchmarks import synthetic
from configs import eval as eval_config
from configs import i2e as i2e_config
from data_prep import build_i2e, engine
from mofi_jax.common import errors
from mofi_jax.evaluators.sets import captions as captions_file
from mofi_jax.evaluators.sets import pictures as picture_sets
from tests import inputs, label_tables

ROOT = pathlib.Path(__file__).parents[1]
SAMPLE = ROOT / "data_prep/sample"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four tars of 25 pairs of the sample each, and pictures and captions that cannot be used."""
    folder = tmp_path_factory.mktemp("in")
    for shard in range(4):
        with (
            tarfile.open(SAMPLE / f"pairs/{shard:05d}.tar.gz") as source,
            tarfile.open(folder / f"{shard:05d}.tar", "w") as target,
        ):
            for info in source.getmembers()[:75]:
                target.addfile(info, source.extractfile(info))
            for name, data in (
                (f"bad{shard}.jpg", b"no picture"),
                (f"bad{shard}.txt", b"a rose"),
                (f"none{shard}.txt", b"a rose"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                target.addfile(info, io.BytesIO(data))
    return folder


def make_config(folder, arguments="labels=text", **changes):
    kb = SAMPLE / "knowledge_base.jsonl.gz"
    config = i2e_config.get_config(f"folder={folder},kb={kb},{arguments}")
    changes = {"min_images": 1, "shard_examples": 30, "vocab_size": 400, "workers": 1} | changes
    config.update(changes)
    return config


def digests(workdir):
    """The sha256 of everything that is written, but for what tells of this run alone."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        inside = path.relative_to(workdir)
        told = path.suffix in (".json", ".jsonl") and inside.parts[0] not in ("i2t", "i2e")
        told |= inside.parts[0] == "report"  # the data card shows how long the stages took
        if path.is_file() and not told and not path.name.startswith("."):
            found[str(inside)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    """Labels by text with one worker."""
    workdir = tmp_path_factory.mktemp("reference")
    result = build_i2e.build(make_config(folder), str(workdir))
    return workdir, result


def test_the_data_set_opens_by_name_and_agrees_with_the_funnel(reference):
    import tensorflow_datasets as tfds

    workdir, result = reference
    assert json.loads((workdir / "result.json").read_text()) == result
    stages = result["stages"]
    assert stages["pairs"]["pairs"] == 100
    assert stages["pairs"]["rejected"] == 8
    labelled = stages["labels_final"]["labelled"]
    assert 80 <= labelled <= 100
    assert stages["shards"]["records"] == labelled
    source = tfds.data_source("i2e", data_dir=str(workdir), split="train")
    assert len(source) == labelled
    ids = [entity for record in source for entity in record["entity_ids"]]
    assert set(ids) == set(range(stages["vocabulary"]["entities"]))
    assert (workdir / "report/index.html").exists()


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_workers_writes_the_same_bytes(reference, folder, tmp_path, workers):
    workdir, result = reference
    again = build_i2e.build(make_config(folder, workers=workers), str(tmp_path))
    assert again["shards_sha256"] == result["shards_sha256"]
    assert digests(tmp_path) == digests(workdir)


def test_held_out_pairs_are_in_no_data_set_and_become_a_set_to_measure_on(
    reference, folder, tmp_path
):
    workdir, before = reference
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    config = make_config(folder, held_out=5_000)
    result = build_i2e.build(config, str(tmp_path))
    count = result["stages"]["labels_final"]["held_out"]
    assert count > 1
    assert result["stages"]["shards"]["records"] == before["stages"]["shards"]["records"] - count
    pictures = picture_sets.read_set(tmp_path / "evaluation/held_out.tar")
    table = picture_sets.read_classes(tmp_path / "evaluation/classes.jsonl", pictures)
    texts = captions_file.read_captions(tmp_path / "evaluation/held_out.captions.jsonl", pictures)
    assert len(pictures) == len(texts.picture_things) == count  # no two have the same bytes
    assert all(entry.qid and entry.label for entry in table.values())
    trained = pq.read_table(tmp_path / "i2e/1.0.0/keys.parquet")["key"].to_pylist()
    rejects = label_tables.read(tmp_path, "rejects/dropped-i2e*")
    assert len(rejects) == count
    assert not {row["key"] for row in rejects} & {*trained}
    sets = eval_config.get_config(f"sets={tmp_path}/evaluation").evaluators
    kinds = {options["kind"] for options in sets.values()}
    assert kinds == {"retrieval", "zeroshot", "classification", "image_text"}

    config.held_out = 1  # nothing to look for
    build_i2e.build(config, str(tmp_path))
    assert not [*tmp_path.glob("evaluation/*.tar")]
    config.held_out = 0
    assert build_i2e.build(config, str(tmp_path))["shards_sha256"] == before["shards_sha256"]
    assert not [*tmp_path.glob("evaluation/*.tar")]


def command(folder, workdir, arguments, *flags):
    """The command line of `make_config`."""
    kb = SAMPLE / "knowledge_base.jsonl.gz"
    return [
        *(sys.executable, "-m", "data_prep.build_i2e", f"--workdir={workdir}"),
        f"--config=configs/i2e.py:folder={folder},kb={kb},{arguments}",
        *("--config.min_images=1", "--config.shard_examples=30", "--config.vocab_size=400"),
        *flags,
    ]


def kill_when(arguments, workdir, sign):
    """Runs the command and kills it as soon as a file like `sign` is there."""
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not list(workdir.glob(sign)):
            time.sleep(0.01)
        assert process.poll() is None, "finished before it could be killed"
        process.send_signal(signal.SIGKILL)
    assert not (workdir / "result.json").exists()


def test_killed_and_started_again_it_ends_in_the_same_bytes(reference, folder, tmp_path):
    workdir, _ = reference
    arguments = command(folder, tmp_path, "labels=text", "--config.workers=2")
    # While pairs are listed, while captions are linked, and while shards are written.
    for sign in ("pairs/*.parquet", "links/*.parquet", "plan-i2e/*.parquet"):
        kill_when(arguments, tmp_path, sign)
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    assert digests(tmp_path) == digests(workdir)


def test_a_finished_folder_costs_no_heavy_import(reference, folder):
    workdir, _ = reference
    kb = SAMPLE / "knowledge_base.jsonl.gz"
    code = (
        "import sys; from configs import i2e; before = set(sys.modules);"
        "from data_prep import build_i2e;"
        f"c = i2e.get_config('folder={folder},kb={kb},labels=text');"
        "c.update(dict(min_images=1, shard_examples=30, vocab_size=400, workers=1));"
        f"build_i2e.build(c, {str(workdir)!r});"
        "print(sorted({'jax', 'spacy', 'tensorflow_datasets', 'duckdb'}"
        " & (set(sys.modules) - before)))"
    )
    before = digests(workdir)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
    assert "shard/s" not in done.stderr, "something was done again"
    assert digests(workdir) == before


def test_raw_pairs_are_all_there_and_without_labels(folder, tmp_path):
    from mofi_jax.data import records

    result = build_i2e.build(make_config(folder, "dataset=i2t"), str(tmp_path))
    assert list(result["stages"]) == ["pairs", "dropped", "shards"]
    source = records.open_source(tmp_path, "i2t")
    assert len(source) == 100
    assert all(len(source[i]["entity_ids"]) == 0 for i in range(100))
    assert not (tmp_path / "kb").exists()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP model of a few thousand random parameters, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("clip")
    words = ["a drawing of a red rose", "an icon of a black cat", "clip art", "emoji", "sticker"]
    synthetic.write_clip(folder / "hf", words)
    return folder / "hf"


@pytest.mark.slow
def test_labels_by_clip_are_the_same_bytes_for_two_workers_and_after_a_kill(folder, clip, tmp_path):
    # Both as commands: the tests' own process simulates 8 devices, which split a batch otherwise
    # and so round its last bits otherwise.
    whole = tmp_path / "whole"
    arguments = ("labels=clip", f"--config.clip={clip}")
    run = command(folder, whole, *arguments, "--config.workers=1")
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    stages = json.loads((whole / "result.json").read_text())["stages"]
    assert 0 < stages["labels"]["labelled"] < stages["links"]["linked"]
    assert stages["shards"]["records"] == stages["labels_final"]["labelled"]

    work = tmp_path / "killed"
    run = command(folder, work, *arguments, "--config.workers=2")
    kill_when(run, work, "embeddings/*.parquet")
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    assert digests(work) == digests(whole)

    # Another threshold: no picture is read again.
    scored = (
        engine.sha256(work / "embeddings/manifests.jsonl"),
        [os.stat(path).st_mtime for path in engine.listed(work / "embeddings", ".npy")],
    )
    config = make_config(folder, "labels=clip", clip=str(clip), max_labels=1, min_probability=0.0)
    looser = build_i2e.build(config, str(work))["stages"]
    assert looser["labels"]["labelled"] > stages["labels"]["labelled"]
    again = (
        engine.sha256(work / "embeddings/manifests.jsonl"),
        [os.stat(path).st_mtime for path in engine.listed(work / "embeddings", ".npy")],
    )
    assert again == scored


# ---------------------------------------------------------------------------------------- bad input


def fails(config, tmp_path):
    with pytest.raises(errors.BadInput) as caught:
        build_i2e.build(config, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists(), "bad input writes nothing"
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("dataset", "i3e", "choose i2e or i2t"),
        ("labels", "guess", "choose clip, text, given"),
        ("workers", 0, "give at least 1"),
        ("jpeg_quality", 101, "give 1 to 100"),
        ("max_pixels", 64_000_001, "give at most 64000000"),
        ("shard_examples", 0, "give at least 1"),
        ("max_candidates", 0, "give at least 1"),
        ("sources", ("x=/nowhere",), "does not exist: name a folder"),
        ("knowledge_base", "/nowhere.jsonl", "does not exist: name a"),
        ("knowledge_base", "", "write kb=PATH"),
        ("failure_budget", 1.0, "give a share from 0 to below 1"),
        ("rows_per_shard", 0, "give at least 1"),
        ("boilerplate", ("(",), "is no regular expression"),
        ("case_weight", 0.5, "give 1, which turns it off, or more"),
        ("nil_weight", -1.0, "give 0, which turns it off, or more"),
        ("spacy_model", "no_such_model", "is no installed spaCy package"),
    ],
)
def test_values_that_cannot_be_used_are_told(folder, tmp_path, key, value, words):
    message = fails(make_config(folder, **{key: value}), tmp_path)
    assert key in message
    assert words in message


def test_clip_labels_need_a_model_and_a_template(folder, tmp_path):
    config = make_config(folder, "labels=clip")
    assert "config.clip=None cannot be used: name the folder" in fails(config, tmp_path)
    config.clip = str(tmp_path)
    config.template = "{title}"
    assert "config.template='{title}' cannot be used" in fails(config, tmp_path)


def test_the_command_tells_bad_input_in_one_line(tmp_path):
    def run(*arguments):
        line = [sys.executable, "-m", "data_prep.build_i2e", *arguments]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    workdir = f"--workdir={tmp_path / 'w'}"
    line = run("--config=configs/i2e.py:sample", workdir, "--config.no_such_key=1")
    assert "no_such_key" in line
    assert "labls" in run("--config=configs/i2e.py:sample,labls=text", workdir)
    assert "takes either" in run("--config=configs/i2e.py:labels=text", workdir)
    line = run("--config=configs/i2e.py:folder=/nowhere,kb=x", workdir)
    assert "/nowhere does not exist" in line
    assert not (tmp_path / "w").exists()


def test_every_key_of_the_configuration_is_read():
    text = "".join(path.read_text() for path in (ROOT / "data_prep").rglob("*.py"))
    for key in i2e_config.get_config("sample"):
        assert f"config.{key}" in text or f'"{key}"' in text or f"    {key}: " in text, key


def test_a_run_that_rejects_nearly_everything_ends_with_an_error(tmp_path):
    members = [("a.png", inputs.picture()), ("a.txt", b"a rose")]
    members += [(f"{n}.{end}", b"no picture") for n in range(3) for end in ("jpg", "txt")]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/00000.tar").write_bytes(inputs.tar_bytes(members))
    config = i2e_config.get_config(f"folder={tmp_path / 'in'},dataset=i2t")
    config.update(workers=1, vocab_size=300)
    said = r"^3 of 4 samples cannot be used \(3 not_a_picture\): see .*rejects, correct"
    with pytest.raises(errors.BadInput, match=said):
        build_i2e.build(config, str(tmp_path / "W"))
    config.reject_budget = 0.75
    result = build_i2e.build(config, str(tmp_path / "W"))
    assert result["stages"]["shards"]["records"] == 1
    assert result["lost_to_damage"] == 0


def test_the_funnel_tells_what_was_lost_to_damage():
    stages = {"pairs": {"pairs": 60, "rejected": 10, "pairs_missing": 5}, "shards": {"records": 50}}
    quarantined = {"indexed/00001": 30, "labels/00002": 10}
    lost = build_i2e.lost_to_damage(stages["pairs"], quarantined)
    assert lost == 45
    told = build_i2e.funnel(
        {"stages": stages, "quarantined": quarantined, "lost_to_damage": lost}
    ).splitlines()
    assert told[0].split()[:3] == ["pairs", "read", "100"]  # 30 of them in a shard nobody can read
    assert told[-1] == "45 pairs are lost to damaged files and shards"
    told = build_i2e.funnel(
        {"stages": stages, "quarantined": {"scanned/00003": 1}, "lost_to_damage": 6}
    )
    assert told.endswith("at least 6 pairs are lost to damaged files and shards")


def test_pairs_that_are_nowhere_end_the_run(tmp_path):
    with engine.Engine(tmp_path) as work:
        work.quarantined = {"indexed/a": 7, "captions/00001": 10}
        build_i2e._check_whole("links", 100, 90, work)
        with pytest.raises(engine.ShardError, match="links/ holds 80 of 100 pairs, and 10 are in"):
            build_i2e._check_whole("links", 100, 80, work)

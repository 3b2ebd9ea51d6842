"""The laptop's recipe: what follows from the data set, and the knowledge base that comes along."""

import gzip
import json
import math
import pathlib

import pytest

from configs import i2e, small
from data_prep.kb import build as kb_build
from mofi_jax.training import settings
from tests import datasets, inputs


def test_the_length_follows_from_the_pairs(tmp_path):
    datasets.write(tmp_path, examples=48)
    datasets.write(tmp_path, name="i2t", examples=96)
    for task, examples, factor in (("multitask", 48, 27), ("contrastive", 96, 12)):
        config = small.get_config(f"task={task},data={tmp_path}")
        settings.validate(config)
        assert config.total == f"{round(factor * math.sqrt(examples))} steps"
    assert small.get_config(f"data={tmp_path / 'none'}").total == "1909 steps"  # of 5,000


def test_a_run_is_measured_on_the_pairs_that_were_held_out(tmp_path):
    assert not small.get_config(f"data={tmp_path}").evaluators
    folder = tmp_path / "c++ (1)/evaluation"  # a `,` would end the argument data=
    folder.mkdir(parents=True)
    for name in ("held_out.tar", "held_out.captions.jsonl"):
        (folder / name).touch()
    (folder / "classes.jsonl").write_text('{"class": 1, "id": "n1", "label": "dog"}\n')
    evaluators = small.get_config(f"data={folder.parent}").evaluators
    names = {"retrieval", "zeroshot", "entity", "captions"}
    assert set(evaluators) == {f"{name}_held_out" for name in names}
    assert {options.every for options in evaluators.values()} == {"25 percent"}


def test_wordnet_comes_along_with_its_licence():
    path = pathlib.Path(i2e.get_config("folder=PAIRS,kb=wordnet").knowledge_base)
    kb_build.check_source(str(path))
    with gzip.open(path, "rt") as lines:
        rows = [line for line in lines if line.startswith('{"id":"n')]
    assert len(rows) == 82_115
    [dog] = [json.loads(row) for row in rows if row.startswith('{"id":"n02084071"')]
    assert dog["label"] == "dog"
    assert "domestic dog" in dog["aliases"]
    assert "Princeton" in (path.parent / "LICENSE-WordNet-3.0.txt").read_text()


@pytest.mark.slow
def test_wordnet_builds(tmp_path):
    path = i2e.get_config("folder=PAIRS,kb=wordnet").knowledge_base
    manifest = kb_build.build(path, tmp_path / "kb", inputs.kb_rules())
    assert manifest["counts"]["entities"] == 82_115
    assert not manifest["counts"]["rejected"]

"""Any one shard of any stage in quarantine: every key comes out once, and the next run mends it."""

import collections
import hashlib
import json
import shutil
import tarfile
import tempfile

import hypothesis
import pytest
from etils import epath
from hypothesis import strategies as st

from configs import i2e as i2e_config
from data_prep import build_i2e, engine
from data_prep.dataset import order as record_order
from data_prep.dataset import shards
from data_prep.engine import jobs, manifests, relational
from data_prep.linking import stage as linking_stage
from data_prep.pairs import pictures as pairs_pictures
from data_prep.pairs import stage as pairs_stage
from data_prep.pairs.samples import Rejected
from data_prep.selection import embed
from mofi_jax.data import ops, records
from tests import workdirs

KB = [
    *({"qid": f"Q{n}", "label": name, "sitelinks": 9} for n, name in enumerate(workdirs.COLOURS)),
    {"qid": "Q9", "label": "background", "sitelinks": 9},
]


def config(folder, dataset):
    config = i2e_config.get_config(f"folder={folder / 'tars'},kb={folder / 'kb.jsonl'}")
    (folder / "blocked").write_text("0" * 64 + "\n")
    config.update(
        {"workers": 1, "clip": str(folder), "shard_examples": 20, "vocab_size": 300},
        min_side=8,
        min_images=1,
        max_images=10_000,
        rows_per_shard=10,
        failure_budget=0.01,
        dataset=dataset,
    )
    config.filters.duplicates = "exact"
    config.filters.safety.blocked_hashes = str(folder / "blocked")
    config.filters.eval_sets.held_out = str(folder / "held_out")
    return config


def prepare(patch):
    """A model that sees colours, and several buckets of captions."""
    patch.setattr(embed, "load_model", lambda *_: workdirs.Model())
    patch.setattr(linking_stage, "_BUCKETS", {6: float("inf")})
    patch.setattr(relational, "_FILES_PER_RUN", 1)
    patch.setattr(record_order, "_ROWS_PER_PLAN", 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tars, a knowledge base and work directories of finished runs."""
    folder = tmp_path_factory.mktemp("quarantine")
    workdirs.write(folder)
    shutil.rmtree(folder / "W")
    (folder / "kb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in KB))
    (folder / "held_out").mkdir()
    picture = workdirs.picture(workdirs.Pair("9999", 1, 1), "png")
    (folder / "held_out/1_a.png").write_bytes(picture)
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        for dataset in ("i2t", "i2e"):
            build_i2e.build(config(folder, dataset), folder / dataset)
    return folder


def test_stages_know_the_libraries_that_decide_their_bytes(folder):
    decoding = ("indexed", "embeddings", "eval_hashes", "eval_embeddings", "shards-i2e")
    for name, stages in (("decoders", decoding), ("tokenizers", ("texts", "metadata-i2e"))):
        for stage in stages:
            found = engine.read_manifests(folder / "i2e", stage)
            assert found
            assert all(manifest["settings"][name] for manifest in found), stage


def keys_of(workdir, dataset):
    """Written keys, and rejected ones of this data set's stages."""
    source = records.open_source(workdir, dataset)
    rejected = []
    for path in engine.listed(workdir / "rejects"):
        rejected += engine.read_table(path)["key"].to_pylist()
    return [example["key"] for example in map(source.__getitem__, range(len(source)))], rejected


def adds_up(result, workdir, dataset):
    """Every pair that was read is written or a reject, step by step, in the funnel and the card."""
    rejects = collections.Counter()
    for path in engine.listed(workdir / "rejects"):
        rejects.update(engine.read_table(path)["reason"].to_pylist())
    lost = rejects["quarantined"]
    assert result["lost_to_damage"] == lost
    *told, last = build_i2e.funnel(result).splitlines()
    unread = any(name.startswith(("unpacked/", "scanned/")) for name in result["quarantined"])
    loss = f"{'at least ' * unread}{lost:,} pairs are lost to damaged files and shards"
    assert (last == loss) == bool(lost)
    steps = [int(found) for line in told if (found := line[24:38].strip()).isdigit()]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == steps[-1] + rejects.total()
    if dataset == "i2t":
        return
    card = json.loads((workdir / "report/report.json").read_text())
    funnel, written = card["funnel"], steps[-1]
    names = ("read", "valid", "with_mention", "with_candidate", "labelled")
    assert [funnel[name] for name in names if name != "with_mention"] == steps[:4]
    left = [funnel[name] for name in names] + [row["left"] for row in funnel["removed"]]
    assert left == sorted(left, reverse=True)
    assert left[-1] == written == funnel["final"]
    assert None not in [row["reason"] for row in funnel["removed"]]
    assert sum(row["count"] for row in card["rejects"]) == rejects.total()
    assert card["sources"] == [
        {"source": card["name"], **{name: funnel[name] for name in (*names[1:], "final")}}
    ]
    counts = collections.Counter()
    for example in records.open_source(workdir, dataset):
        counts.update(example["entity_ids"].tolist())
    entities = records.read_entities(workdir / dataset / records.VERSION / records.ENTITIES_FILE)
    assert entities.counts.tolist() == [counts[i] for i in range(len(entities))]
    assert sum(int(n) * count for n, count in card["labels_per_picture"].items()) == counts.total()
    assert sum(b["labels"] for b in card["images_per_entity"]["bins"]) == counts.total()
    assert card["entity_types"]["labels"] == counts.total()


def digest(workdir, dataset):
    found = {}
    for path in sorted((workdir / dataset / records.VERSION).iterdir()):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def forget(workdir, stage, shard):
    with manifests.Ledger(epath.Path(workdir), stage) as ledger:
        ledger.remove(shard)


# The others' results are about all pairs: no shard of them can be left out.
STAGES = {
    "i2t": ("scanned", "indexed", "pairs", "unsafe", "eval_matches", "dropped-i2t"),
    "i2e": (
        "caption_rows",
        "captions",
        "link_rows",
        "gathered",
        "embeddings",
        "z_scores",
        "labels",
    ),
}
STAGES["i2t"] += tuple(f"{stage}-i2t" for stage in ("ordered", "planned", "shards"))
STAGES["i2e"] += ("eval_nearest", "eval_cosines", "unsafe", "dropped-i2e", "capped", "labels_final")
STAGES["i2e"] += tuple(f"{stage}-i2e" for stage in ("ordered", "planned", "shards"))


BROKEN = {*STAGES["i2e"], "indexed", "pairs"}


@hypothesis.settings(
    max_examples=3, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate]
)
@hypothesis.given(
    st.sets(st.sampled_from(sorted(BROKEN)), min_size=2, max_size=4),
    st.lists(st.integers(0, 59), min_size=12, max_size=12, unique=True),
)
def test_whatever_is_damaged_adds_up(folder, stages, pictures):
    """A shard of each of some stages, pictures that cannot be read, others not any more."""
    bad, gone = ({*pictures[start::2]} for start in (0, 1))
    check, run, to_jpeg = pairs_pictures.check_picture, jobs._run, shards.to_jpeg
    digests = {}
    for path in engine.listed(folder / "i2e/pairs"):
        table = engine.read_table(path, ["sha256", "key"])
        digests |= dict(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))

    def number(data):
        return int(digests.get(hashlib.sha256(data).hexdigest(), -1))

    def check_picture(data, limits):
        if number(data) in bad:
            raise Rejected("truncated")
        return check(data, limits)

    def encode(data, max_side, quality):
        if number(data) in gone:
            raise ops.UndecodableImage("not any more")
        return to_jpeg(data, max_side, quality)

    def fail(job):
        if job.stage in stages and job.task.name == broken[job.stage]:
            raise ValueError("a shard that cannot be made")
        return run(job)

    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        workdir = epath.Path(temporary) / "W"
        shutil.copytree(folder / "i2e", workdir)
        broken = {}
        for stage in {*stages, "indexed", "shards-i2e"}:
            names = [manifest["shard"] for manifest in engine.read_manifests(workdir, stage)]
            broken[stage] = names[len(stage) % len(names)]
            for name in names:
                forget(workdir, stage, name)
        prepare(patch)
        patch.setattr(pairs_pictures, "check_picture", check_picture)
        patch.setattr(shards, "to_jpeg", encode)
        patch.setattr(jobs, "_run", fail)
        result = build_i2e.build(config(folder, "i2e"), workdir)
        assert result["quarantined"]
        adds_up(result, workdir, "i2e")
        written, rejected = keys_of(workdir, "i2e")
        assert sorted([*written, *rejected]) == [f"{number:04d}" for number in range(60)]


@pytest.mark.parametrize(
    ("dataset", "stage"), [(name, stage) for name, stages in STAGES.items() for stage in stages]
)
def test_one_shard_in_quarantine(folder, tmp_path, monkeypatch, dataset, stage):
    workdir = tmp_path / "W"
    shutil.copytree(folder / dataset, workdir)
    names = [manifest["shard"] for manifest in engine.read_manifests(workdir, stage)]
    assert len(names) > 1
    forget(workdir, stage, names[0])
    prepare(monkeypatch)
    run = jobs._run

    def fail(job):
        if (job.stage, job.task.name) == (stage, names[0]):
            raise ValueError("a shard that cannot be made")
        return run(job)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_run", fail)
        result = build_i2e.build(config(folder, dataset), workdir)
    assert list(result["quarantined"]) == [f"{stage}/{names[0]}"]
    written, rejected = keys_of(workdir, dataset)
    assert sorted([*written, *rejected]) == [f"{number:04d}" for number in range(60)]
    assert result["quarantined"][f"{stage}/{names[0]}"] > 0
    adds_up(result, workdir, dataset)

    result = build_i2e.build(config(folder, dataset), workdir)
    assert result["quarantined"] == {}
    assert digest(workdir, dataset) == digest(folder / dataset, dataset)
    assert sorted(keys_of(workdir, dataset)[1]) == sorted(keys_of(folder / dataset, dataset)[1])
    assert not list((workdir / "quarantine").iterdir())


def test_what_is_about_all_pairs_is_never_left_out(folder, tmp_path, monkeypatch):
    """All stages that no test above names, and they end the run in one sentence, nothing lost."""
    prepare(monkeypatch)
    run = jobs._run
    shutil.copytree(folder / "i2e", tmp_path / "W")
    stages = {path.name for path in (tmp_path / "W").iterdir() if path.is_dir()}
    stages -= {*STAGES["i2t"], *STAGES["i2e"], "kb"}
    stages = [name for name in stages if engine.read_manifests(tmp_path / "W", name)]
    assert len(stages) > 10
    for stage in stages:
        [shard, *_] = (m["shard"] for m in engine.read_manifests(tmp_path / "W", stage))
        forget(tmp_path / "W", stage, shard)

        def fail(job, broken=(stage, shard)):
            if (job.stage, job.task.name) == broken:
                raise ValueError("a shard that cannot be made")
            return run(job)

        with monkeypatch.context() as patch:
            patch.setattr(jobs, "_run", fail)
            with pytest.raises(engine.ShardError, match=f"stage {stage}"):
                build_i2e.build(config(folder, "i2e"), tmp_path / "W")
    build_i2e.build(config(folder, "i2e"), tmp_path / "W")
    assert digest(tmp_path / "W", "i2e") == digest(folder / "i2e", "i2e")


def _not_the_first(task, outputs, settings):
    if task.inputs:
        raise ValueError("a shard that cannot be made")
    return {}


def test_a_pair_that_has_the_key_of_a_reject_is_lost_too(tmp_path):
    pair = workdirs.Pair("0000", 1, 1)
    for name, data in (("0", b"no picture"), ("1", workdirs.picture(pair, "jpg"))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for suffix, member in (("jpg", data), ("txt", b"words")):
                workdirs.add(tar, f"{pair.key}.{suffix}", member)
    work = engine.Engine(tmp_path / "W", failure_budget=0.5)
    pairs_stage.run(workdirs.config(sources=(f"words={tmp_path}",)), work)
    [shard] = engine.listed(tmp_path / "W/pairs")
    tasks = [engine.Task("a", (shard,)), engine.Task("b", ())]
    work.map_shards("later", _not_the_first, tasks, {})
    assert work.quarantined == {"later/a": 1}
    reasons = [engine.read_table(path)["reason"] for path in engine.listed(tmp_path / "W/rejects")]
    assert [r for column in reasons for r in column.to_pylist()] == ["quarantined", "not_a_picture"]

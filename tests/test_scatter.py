"""Rows that change shards: scatter, gather, aggregates; nothing lost, whatever the workers."""

import collections
import os

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from data_prep import engine

SQL = "SELECT value, name, value % $buckets AS bucket FROM read_parquet($files)"


def gather(task, outputs, settings):
    bucket = int(task.name)
    table = engine.read_buckets(task.inputs, bucket, bucket + 1).sort_by("value")
    outputs.write_table(f"sorted/{task.name}.parquet", table)
    return {"rows": len(table)}


def write_shards(folder, shards):
    folder.mkdir()
    tasks = []
    for number, values in enumerate(shards):
        path = folder / f"{number:05d}.parquet"
        names = [f"n{value}" for value in values]
        table = pa.table(
            {"value": pa.array(values, pa.int64()), "name": pa.array(names, pa.string())}
        )
        pq.write_table(table, path)
        tasks.append(engine.Task(path.stem, (path,)))
    return tasks


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    st.lists(st.lists(st.integers(0, 1000), max_size=20), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_every_row_arrives_in_its_bucket(tmp_path_factory, shards, buckets):
    folder = tmp_path_factory.mktemp("scatter")
    work = engine.Engine(folder / "w")
    tasks = write_shards(folder / "in", shards)
    scattered = work.scatter("spilled", SQL, tasks, buckets, {"buckets": buckets})
    rows = collections.Counter(value for shard in shards for value in shard)
    assert scattered.bucket_rows().tolist() == [
        sum(n for value, n in rows.items() if value % buckets == b) for b in range(buckets)
    ]
    for bucket in range(buckets):
        found = engine.read_buckets(scattered.files, bucket, bucket + 1)
        assert found.column_names == ["value", "name"]
        assert collections.Counter(found["value"].to_pylist()) == {
            value: n for value, n in rows.items() if value % buckets == bucket
        }
    both = engine.read_buckets(scattered.files, 0, buckets)
    assert len(both) == sum(rows.values())


def test_workers_do_not_change_what_is_gathered(tmp_path):
    shards = np.random.default_rng(0).integers(0, 100, (4, 50)).tolist()
    tasks = write_shards(tmp_path / "in", shards)
    digests = []
    for workers in (1, 2):
        work = engine.Engine(tmp_path / f"w{workers}", workers)
        scattered = work.scatter("spilled", SQL, tasks, 3, {"buckets": 3})
        gathers = [engine.Task(f"{bucket:05d}", scattered.files) for bucket in range(3)]
        manifests = work.map_shards("sorted", gather, gathers, {})
        work.close()
        digests.append([output["sha256"] for m in manifests for output in m["outputs"]])
    assert digests[0] == digests[1]
    assert engine.total_counts(manifests) == {"rows": 200}


def test_tables_are_joined_within_a_task(tmp_path):
    tasks = write_shards(tmp_path / "in", [[1, 2, 3]])
    pq.write_table(pa.table({"value": [2, 3, 4], "extra": ["b", "c", "d"]}), tmp_path / "x.parquet")
    sql = (
        "SELECT a.value, b.extra, 0 AS bucket FROM read_parquet($a) AS a"
        " JOIN read_parquet($b) AS b USING (value)"
    )
    task = engine.Task("00000", (*tasks[0].inputs, tmp_path / "x.parquet"))
    scattered = engine.Engine(tmp_path / "w").scatter("s", sql, [task], 1, {}, ("a", "b"))
    found = engine.read_buckets(scattered.files, 0, 1).to_pylist()
    assert sorted((row["value"], row["extra"]) for row in found) == [(2, "b"), (3, "c")]


def test_a_bucket_out_of_range_is_an_error(tmp_path):
    tasks = write_shards(tmp_path / "in", [[1, 2, 3]])
    with pytest.raises(engine.ShardError, match=r"buckets 1 to 3 are not in \[0, 2\)"):
        engine.Engine(tmp_path / "w").scatter(
            "s", "SELECT value AS bucket, name FROM read_parquet($files)", tasks, 2
        )


@pytest.mark.parametrize(("count", "most"), [(0, 3), (1, 3), (3, 3), (10, 3), (7, 100)])
def test_runs_cover_everything_once_and_are_few(count, most):
    found = engine.split_evenly(count, most)
    assert [number for run in found for number in run] == list(range(count))
    assert len(found) <= most
    assert len({len(run) for run in found[:-1]}) <= 1


def test_aggregates_write_the_rows_of_their_queries(tmp_path):
    tasks = write_shards(tmp_path / "in", [[1, 2, 2], [2, 5]])
    files = [path for task in tasks for path in task.inputs]
    work = engine.Engine(tmp_path / "w")
    queries = {
        "counts/values.parquet": "SELECT value, count(*) AS n FROM read_parquet($files)"
        " GROUP BY value HAVING count(*) >= $least ORDER BY value",
        "counts/total.parquet": "SELECT count(*) AS n FROM read_parquet($files)",
    }
    manifest = work.aggregate("counts", queries, {"files": files}, {"least": 2})
    assert manifest["counts"] == {"counts/values": 1, "counts/total": 1}
    found = pq.read_table(work.workdir / "counts/values.parquet").to_pylist()
    assert found == [{"value": 2, "n": 3}]
    before = os.stat(work.workdir / "counts/values.parquet").st_mtime_ns
    work.aggregate("counts", queries, {"files": files}, {"least": 2})
    assert os.stat(work.workdir / "counts/values.parquet").st_mtime_ns == before


def test_file_names_are_names_neither_patterns_nor_columns(tmp_path):
    """Beside `w[1]` lies `w1`, which the pattern means; `text=9` is a folder, not a caption."""
    named = {}
    for name, text in (("text=9/w[1]", "mine"), ("text=9/w1", "theirs"), ("text=9/w*?", "odd")):
        named[text] = tmp_path / name / "00000.parquet"
        named[text].parent.mkdir(parents=True)
        pq.write_table(pa.table({"text": [text]}), named[text])
    outputs = engine.Outputs(tmp_path / "W", "stage", "0")
    with engine.connect(outputs) as connection:
        for text, path in named.items():
            sql = "SELECT text, filename FROM read_parquet($files, filename = true)"
            asked = {"files": [path], "not mentioned": 1}
            assert engine.ask(connection, sql, asked).fetchall() == [(text, str(path))]
            assert engine.read_table(path).to_pylist() == [{"text": text}]
            assert engine.listed(path.parent) == [path]


def test_processes_share_the_memory_of_a_machine(tmp_path):
    sizes = []
    for processes in (1, 8):
        with engine.connect(engine.Outputs(tmp_path, "s", "0", processes)) as connection:
            [(limit, threads)] = connection.execute(
                "SELECT current_setting('memory_limit'), current_setting('threads')"
            ).fetchall()
        amount, unit = limit.split()
        sizes.append(float(amount) * {"GiB": 1024, "MiB": 1}[unit])
        assert threads == 1
    assert sizes[0] / sizes[1] == pytest.approx(8, rel=0.05)


def write_repeated(task, outputs, settings):
    for shard, table in engine.gather_shards(task, settings):
        outputs.write_table(f"repeated/{shard}.parquet", table)
    return {}


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1, max_size=7))
def test_repeated_values_come_back_to_their_shards(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("repeated")
    tasks = write_shards(folder / "in", shards)
    sql = """
        SELECT value::VARCHAR AS value, parse_filename(filename, true) AS shard,
               file_row_number AS "row", concat(shard, '-', "row") AS key
        FROM read_parquet($files, filename = true, file_row_number = true)
    """
    work = engine.Engine(folder / "w")
    files = {"files": [task.inputs[0] for task in tasks]}
    tasks, settings = work.repeated("value", sql, files, ["shard", "row"])
    work.map_shards("repeated", write_repeated, tasks, settings)
    first: dict[int, str] = {}
    for path, values in zip(files["files"], shards, strict=True):
        name = os.path.basename(path)
        expected = [
            {"row": row, "key": f"{name[:-8]}-{row}", "first": first[value]}
            for row, value in enumerate(values)
            if first.setdefault(value, f"{name[:-8]}-{row}") != f"{name[:-8]}-{row}"
        ]
        assert pq.read_table(work.workdir / "repeated" / name).to_pylist() == expected

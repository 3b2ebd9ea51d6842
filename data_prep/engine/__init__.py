"""Runs stages over shards; knows nothing of any stage.

    stages        Engine: `map_shards`, and what is finished, in quarantine or stray
    jobs          one shard in whatever process: Task, Outputs, retries, what can go wrong
    executors     where jobs run: processes of this machine, a Ray cluster
    slurm         or array jobs of a SLURM cluster
    quarantine    shards that could not be made, and the pairs that are lost with them
    manifests     what a finished shard was made from, and whether it still is
    relational    parquet and SQL; aggregate, scatter, gather: how rows change shards
    progress      what a person sees meanwhile

The doors are below; a stage needs no other.
"""

from data_prep.engine.jobs import Outputs, ShardError, StageFunction, Task, kept, rejects_table
from data_prep.engine.manifests import MANIFESTS, outdated, sha256, stage_seconds, write_durably
from data_prep.engine.manifests import read as read_manifests
from data_prep.engine.quarantine import DUPLICATE_KEY
from data_prep.engine.relational import (
    MOST_BUCKETS,
    Scattered,
    aligned,
    ask,
    bucket_of,
    connect,
    gather_shards,
    listed,
    read_buckets,
    read_table,
    run_tasks,
    split_evenly,
)
from data_prep.engine.stages import Engine, total_counts

__all__ = [
    "DUPLICATE_KEY",
    "MANIFESTS",
    "MOST_BUCKETS",
    "Engine",
    "Outputs",
    "Scattered",
    "ShardError",
    "StageFunction",
    "Task",
    "aligned",
    "ask",
    "bucket_of",
    "connect",
    "gather_shards",
    "kept",
    "listed",
    "outdated",
    "read_buckets",
    "read_manifests",
    "read_table",
    "rejects_table",
    "run_tasks",
    "sha256",
    "split_evenly",
    "stage_seconds",
    "total_counts",
    "write_durably",
]

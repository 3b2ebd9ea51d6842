"""Jobs on a SLURM cluster, through submitit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence

from etils import epath

from data_prep.engine import executors, jobs
from mofi_jax.common import errors


class Slurm:
    """Array jobs; an element of the array works through a run of the stage's shards.

    The work directory and the inputs lie on a file system that all machines see under the same
    path, and so does this project. A run whose machine dies or whose time is up is made again,
    each of its shards in an element of its own; one that ends so once more is a failure. That is
    noticed where the cluster keeps accounts (sacct).
    """

    # Elements of an array: clusters allow 1,001 where nobody has changed it.
    _MOST_RUNS = 1_000
    _POLL_SECONDS = 1.0

    def __init__(
        self, folder: epath.PathLike, options: str, accelerator: str, cluster: str = "slurm"
    ):
        """
        Args:
          folder: where submitit puts jobs and their logs, until a stage is done in which no job
            died; all machines see it.
          options: what to ask SLURM for, "partition=cpu,time=240,mem=8GB,array_parallelism=64":
            sbatch's long options with underscores, `time` in minutes.
          accelerator: the same on top for the stages with an accelerator,
            "partition=gpu,gpus_per_node=1".
          cluster: submitit's name of a scheduler; "local" starts processes here.

        Raises:
          BadInput: submitit is not installed, this is no machine of a SLURM cluster, or it does not
            know an option.
        """
        try:
            import submitit
        except ImportError as error:
            raise errors.BadInput(
                '--engine=slurm needs submitit: pip install "submitit>=1.5", or leave --engine out.'
            ) from error
        self._submitit, self._options = submitit, {}
        self._folder, self._died = folder, False
        os.environ["PYTHONPATH"] = executors.import_paths()  # jobs inherit it
        try:
            # One each: an executor keeps whatever it was ever asked for.
            self._executors = [submitit.AutoExecutor(folder, cluster=cluster) for _ in range(2)]
            for which, text in ((False, options), (True, f"{options},{accelerator}")):
                self._options[which] = _parsed(text)
                self._executors[which].update_parameters(**self._options[which])
        except (NameError, RuntimeError, TypeError, ValueError) as error:
            raise errors.BadInput(
                f"--engine=slurm cannot be used ({str(error).splitlines()[0]}): run it where sbatch"
                " is, with options such as --slurm=partition=cpu,time=240,array_parallelism=64."
            ) from error

    def run(self, todo: Sequence[jobs.Job], accelerator: bool) -> Iterator[executors.Outcome]:
        asked = {"slurm_mem": f"{max(job.memory for job in todo)}GB"} if todo else {}
        asked["slurm_cpus_per_task"] = max((job.cpus for job in todo), default=1)
        self._executors[accelerator].update_parameters(**asked | self._options[accelerator])
        count = min(len(todo), self._MOST_RUNS)
        runs = [todo[n::count] for n in range(count)]
        while runs:
            again = []
            for run, outcomes in self._submitted(runs, self._executors[accelerator]):
                if not isinstance(outcomes, str):
                    yield from zip(run, outcomes, strict=True)
                    continue
                self._died = True
                if len(run) > 1:
                    again += [[job] for job in run]
                else:
                    told = jobs.ShardError(f"{run[0].where}: SLURM: {outcomes}")
                    yield run[0], jobs.Failure(told, of_shard=True)
            runs = again
        if not self._died:  # else its logs may say why
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Nothing is kept from stage to stage."""

    def _submitted(self, runs: Sequence[Sequence[jobs.Job]], executor) -> Iterator[tuple]:
        """Runs and their outcomes as they end, or in place of them why a run has died."""
        waiting = {}
        try:
            for start in range(0, len(runs), self._MOST_RUNS):
                part = runs[start : start + self._MOST_RUNS]
                try:
                    waiting |= zip(executor.map_array(attempts, part), part, strict=True)
                except RuntimeError as error:
                    said = str(error).partition("\n")[0]  # by sbatch
                    raise errors.BadInput(
                        f"SLURM takes no jobs ({said}): mend --slurm or --slurm_accelerator."
                    ) from error
            for sent in self._submitit.helpers.as_completed([*waiting], None, self._POLL_SECONDS):
                run = waiting.pop(sent)
                try:
                    yield run, sent.result()
                except self._submitit.core.utils.UncompletedJobError as error:
                    yield run, str(error).splitlines()[0]
        finally:
            for sent in waiting:
                sent.cancel(check=False)


def attempts(run: Sequence[jobs.Job]) -> list[jobs.Made | jobs.Failure]:
    """What an element of an array does."""
    return [jobs.attempt(job) for job in run]


def _parsed(text: str) -> dict[str, str | int]:
    """ "NAME=VALUE,..." as submitit's parameters."""
    pairs = [part.partition("=")[::2] for part in text.split(",") if part]
    found = {f"slurm_{k}": int(v) if v.isdecimal() else v for k, v in pairs}
    if not isinstance(found.get("slurm_time", 0), int):
        raise ValueError(f"time={found['slurm_time']} is not a number of minutes")
    return found

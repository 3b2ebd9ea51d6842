"""Where jobs run: in this process and its worker processes, or on a Ray cluster.

An executor takes the jobs of one stage and yields their outcomes in any order. Outcomes do not
depend on it: a job is a pure function of its inputs and settings, and safe to run twice. A job that
needs the accelerator runs in the one process of a machine that owns it, beside another one: what a
shard reads, decodes and writes need not hold up the device.
"""

from __future__ import annotations

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import multiprocessing
import multiprocessing.managers
import os
import pathlib
import socket
import sys
import typing
from collections.abc import Callable, Iterator, Sequence

from absl import logging

from data_prep.engine import jobs
from mofi_jax.common import errors
from mofi_jax.common import processes as worker_processes

Outcome = tuple[jobs.Job, jobs.Made | jobs.Failure]

_KNOCK_SECONDS = 10.0
_AT_ONCE = 2  # jobs in a process that owns an accelerator


class Executor(typing.Protocol):
    """Runs jobs; `close` gives processes and memory back."""

    def run(self, todo: Sequence[jobs.Job], accelerator: bool) -> Iterator[Outcome]: ...

    def close(self) -> None: ...


class Local:
    """Worker processes on this machine, kept from stage to stage: starting one costs a second.

    They are spawned, because forking a process that holds threads (jax, grain, pyarrow) can
    deadlock. A worker that dies, killed by hand or for want of memory, costs its shard alone: the
    shards that were being worked on are run again, each in a process of its own, and one whose
    process dies once more is a failure.
    """

    def __init__(self, workers: int = 1):
        self.workers = workers
        # One process owns the accelerator, and keeps its model from stage to stage.
        self._pools: dict[bool, concurrent.futures.Executor] = {}

    def run(self, todo: Sequence[jobs.Job], accelerator: bool) -> Iterator[Outcome]:
        if self.workers <= 1:
            for job in todo:
                yield job, jobs.attempt(job)
            return
        processes = _AT_ONCE if accelerator else self.workers
        waiting = collections.deque(dataclasses.replace(job, processes=processes) for job in todo)
        running: dict[concurrent.futures.Future, jobs.Job] = {}
        try:
            while waiting or running:
                # No more than are worked on: these are the suspects when a process dies.
                while waiting and len(running) < processes:
                    job = waiting.popleft()
                    running[self._submit(job, accelerator, processes)] = job
                done, _ = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                broken = []
                for future in done:
                    job = running.pop(future)
                    try:
                        yield job, future.result()
                    except concurrent.futures.process.BrokenProcessPool:
                        broken.append(job)
                if broken:
                    suspects = [*broken, *running.values()]
                    running.clear()
                    self.close()
                    logging.warning(
                        "A worker process died: running %s again, each alone",
                        ", ".join(sorted(job.where for job in suspects)),
                    )
                    for job in suspects:
                        yield job, self._alone(job)
        except KeyboardInterrupt:
            running.clear()  # they end with this process, and are done again
            raise
        finally:
            for future in running:
                future.cancel()
            if running and accelerator:
                self.close()  # a manager's process pays no heed to Ctrl-C
            if running:
                concurrent.futures.wait(running)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown()
        self._pools.clear()

    def _submit(
        self, job: jobs.Job, accelerator: bool, processes: int
    ) -> concurrent.futures.Future:
        try:
            with worker_processes.deaf_to_interrupts():
                if accelerator not in self._pools:
                    self._pools[accelerator] = _Owner() if accelerator else spawned(processes)
                return self._pools[accelerator].submit(jobs.attempt, job)
        except concurrent.futures.process.BrokenProcessPool as error:  # died idle
            future: concurrent.futures.Future = concurrent.futures.Future()
            future.set_exception(error)
            return future

    def _alone(self, job: jobs.Job) -> jobs.Made | jobs.Failure:
        with spawned(1) as pool:
            try:
                with worker_processes.deaf_to_interrupts():
                    future = pool.submit(jobs.attempt, job)
                return future.result()
            except concurrent.futures.process.BrokenProcessPool:
                return jobs.Failure(
                    jobs.ShardError(
                        f"{job.where}: its worker process died twice, most likely for want of"
                        " memory: run again with fewer workers; finished shards are kept."
                    ),
                    of_shard=True,
                )


def spawned(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """A pool whose processes end with this one, however it ends."""
    return concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=worker_processes.begin_worker,
    )


class _Owner(concurrent.futures.ThreadPoolExecutor):
    """The process that owns the accelerator, which works on a few jobs at once in its threads."""

    def __init__(self):
        super().__init__(_AT_ONCE)
        # A socket in TMPDIR would have to have a short name.
        address, context = ("127.0.0.1", 0), multiprocessing.get_context("spawn")
        self._manager = _Manager(address, ctx=context)
        try:
            self._manager.start(worker_processes.begin_worker)
        except EOFError as error:
            raise concurrent.futures.process.BrokenProcessPool("died as it started") from error
        self._accelerator = self._manager.accelerator()

    def submit(self, attempt: Callable, job: jobs.Job) -> concurrent.futures.Future:
        return super().submit(self._ask, job)

    def _ask(self, job: jobs.Job) -> jobs.Made | jobs.Failure:
        try:
            return self._accelerator.attempt(job)
        except (EOFError, OSError) as error:
            raise concurrent.futures.process.BrokenProcessPool(str(error)) from error

    def shutdown(self, *arguments, **names) -> None:
        self._manager.shutdown()
        super().shutdown(*arguments, **names)


class _Manager(multiprocessing.managers.BaseManager):
    pass


def import_paths() -> str:
    """A PYTHONPATH with which others import what this process imports, wherever it was started."""
    root = pathlib.Path(__file__).resolve().parents[2]
    return os.pathsep.join(dict.fromkeys([str(root), *filter(None, sys.path)]))


class Ray:
    """Tasks on a Ray cluster, and one actor per machine for the stages with an accelerator.

    The work directory and the inputs lie on a file system that all machines see under the same
    path, and all have this project installed or its folder at the same place. Ray runs a task again
    when its machine dies; what that machine had finished stays.
    """

    # Enough to keep a cluster busy, few enough that a stage of 100,000 shards does not queue up.
    _IN_FLIGHT_PER_CPU = 2

    def __init__(self, address: str | None = None):
        """Joins the cluster at `address` ("auto", "host:port", "ray://..."), or starts a local one.

        Raises:
          BadInput: Ray is not installed, or nothing answers at the address.
        """
        try:
            import ray
        except ImportError as error:
            raise errors.BadInput(
                '--engine=ray needs Ray: pip install "ray>=2.40", or leave --engine out.'
            ) from error
        self._ray = ray
        self._joined = not ray.is_initialized()
        if self._joined:
            try:
                _knock(address)
                ray.init(
                    address=address or "local",
                    runtime_env={"env_vars": {"PYTHONPATH": import_paths()}},
                    log_to_driver=False,
                    include_dashboard=False if not address else None,
                    logging_level="warning",
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise errors.BadInput(
                    f"No Ray cluster answers at {address!r} ({str(error).splitlines()[0]}): start"
                    " one with `ray start --head`, or leave --ray_address out."
                ) from error
        self._attempt = ray.remote(max_retries=3)(jobs.attempt)
        self._actors: list = []

    def run(self, todo: Sequence[jobs.Job], accelerator: bool) -> Iterator[Outcome]:
        if accelerator:
            yield from self._on_actors(todo)
            return
        self._release()  # an idle actor would hold a processor
        todo = [dataclasses.replace(job, processes=0) for job in todo]
        limit = max(2, int(self._IN_FLIGHT_PER_CPU * self._ray.cluster_resources().get("CPU", 1)))
        # A task that asks for more than any machine has would wait for ever.
        machines = [node["Resources"] for node in self._alive()]
        cpus = max(int(machine["CPU"]) for machine in machines)
        memory = max(int(machine.get("memory", 0)) for machine in machines)

        def send(job: jobs.Job):
            asked = {"num_cpus": min(job.cpus, cpus), "memory": min(job.memory << 30, memory)}
            return self._attempt.options(**asked).remote(job)

        yield from self._collect(todo, [send], limit)

    def close(self) -> None:
        self._release()
        if self._joined:
            self._ray.shutdown()

    def _on_actors(self, todo: Sequence[jobs.Job]) -> Iterator[Outcome]:
        if not self._actors:
            self._actors = [self._actor(node) for node in self._machines()]
        todo = [dataclasses.replace(job, processes=_AT_ONCE) for job in todo]
        yield from self._collect(todo, [actor.attempt.remote for actor in self._actors], _AT_ONCE)

    def _collect(
        self, todo: Sequence[jobs.Job], sends: Sequence[Callable], each: int
    ) -> Iterator[Outcome]:
        """Jobs go to whoever has fewest, at most `each`: nobody waits for the slowest."""
        waiting, running = collections.deque(todo), {}
        held = [0] * len(sends)
        while waiting or running:
            while waiting and min(held) < each:
                job, idlest = waiting.popleft(), held.index(min(held))
                running[sends[idlest](job)] = job, idlest
                held[idlest] += 1
            done, _ = self._ray.wait(list(running), num_returns=1)
            for reference in done:
                job, sender = running.pop(reference)
                held[sender] -= 1
                try:
                    outcome = self._ray.get(reference)
                except self._ray.exceptions.RayError as error:
                    told = jobs.ShardError(f"{job.where}: {str(error).splitlines()[0]}")
                    outcome = jobs.Failure(told, of_shard=True)
                yield job, outcome

    def _machines(self) -> list[dict]:
        """The machines that own accelerators; all machines where none has any."""
        alive = self._alive()
        return [node for node in alive if _accelerators(node)] or alive

    def _alive(self) -> list[dict]:
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        return [node for node in alive if node["Resources"].get("CPU", 0) >= 1]

    def _actor(self, node: dict):
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {"num_cpus": 1, "max_restarts": 3, "max_task_retries": 3}
        options["max_concurrency"] = _AT_ONCE
        # All of them: one process per machine, whose step is data-parallel over its devices.
        for name, count in _accelerators(node).items():
            if name == "GPU":
                options["num_gpus"] = count
            else:
                options["resources"] = {name: count}
        # Soft: when the machine dies, the actor starts again on another one.
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        actor = self._ray.remote(**options)(_Accelerator)
        return actor.options(scheduling_strategy=strategy).remote()

    def _release(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []


def _knock(address: str | None) -> None:
    """Raises OSError when nothing listens at "host:port": Ray itself would wait for minutes."""
    host, separator, port = (address or "").removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


class _Accelerator:
    """Its process keeps the model that its first job loads."""

    def attempt(self, job: jobs.Job) -> jobs.Made | jobs.Failure:
        return jobs.attempt(job)


_Manager.register("accelerator", _Accelerator)


def _accelerators(node: dict) -> dict[str, float]:
    return {name: n for name, n in node["Resources"].items() if name in ("GPU", "TPU") and n >= 1}

"""How the processes of a run come together, and agree: start-up, roll call.

`jax.distributed` gathers the processes of a TPU slice, a SLURM job or any list of machines.  When
one of them never comes, its own time-out aborts the others without saying who is missing; the roll
call here comes first and says so.  This file knows nothing of models or data.
"""

import contextlib
import functools
import json
import os
import re
import selectors
import socket
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput

# Longest line of the roll call.
_LINE = 4096
# Pause between attempts to reach the lead, in seconds.
_RETRY = 0.2
# How much longer than process 0 the others wait, in seconds: its verdict names more.
_LEAD_GRACE = 10.0


def start(
    distributed: bool, *, coordinator: str, processes: str, process: str, timeout: int
) -> None:
    """Joins this process to the others and opens its devices; before any other call of jax.

    Args:
      distributed: ``config.distributed``; without it, and without ``coordinator``, it is alone.
      coordinator: HOST:PORT of process 0, which listens there; "" on a TPU slice, under SLURM,
        Kubernetes or Open MPI, where jax finds it.
      processes: how many there are, "" where jax finds it.
      process: which one this is, from 0, "" where jax finds it.
      timeout: seconds to wait for the others (``config.start_timeout``).

    Raises:
      BadInput: flags that do not fit together, no cluster, an address that is taken, processes
        that did not come, by number, or no device of the wanted platform.
    """
    if not (distributed or coordinator or processes or process):
        devices()
        return
    given = [bool(flag) for flag in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise BadInput(
            "--coordinator, --processes and --process belong together: give all three, or none "
            "where jax finds them itself (TPU slice, SLURM, Kubernetes, Open MPI)."
        )
    if all(given):
        address, count, own = coordinator, *_numbers(processes, process)
        explicit: dict[str, Any] = {
            "coordinator_address": address,
            "num_processes": count,
            "process_id": own,
        }
    else:
        address, count, own = _detect(timeout)
        explicit = {}
    if address is not None:
        roll_call(address, count, own, timeout=timeout)
    jax.distributed.initialize(initialization_timeout=timeout, **explicit)
    devices()
    logging.info("process %d of %d", jax.process_index(), jax.process_count())


def devices() -> list[jax.Device]:
    """All devices, of all processes.

    Raises:
      BadInput: JAX_PLATFORMS names what is not there.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        # Without a GPU jax passes "cuda" over and fails an assertion.  Whatever else does not
        # start, such as a TPU that another process holds, may do so later.
        absent = ("not in the list of known backends", "cannot open shared object file")
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in absent):
            raise
        reason = str(error).partition(" (")[0] or "there are none"
        raise BadInput(
            f"JAX_PLATFORMS={jax.config.jax_platforms} names devices that jax cannot use here "
            f"({reason}): unset it, or install what they need, as in pip "
            'install "jax[cuda13]".'
        ) from error


def _numbers(processes: str, process: str) -> tuple[int, int]:
    if not processes.isdecimal() or not process.isdecimal() or int(process) >= int(processes):
        raise BadInput(
            f"--processes={processes} --process={process}: give the number of processes, and this "
            "one's own, counted from 0."
        )
    return int(processes), int(process)


def _detect(timeout: int) -> tuple[str | None, int, int]:
    """Coordinator's address, number of processes and this one's, as jax would find them.

    jax has no public function for it.  Where it moves, the roll call is lost, not the start.
    """
    try:
        from jax._src import clusters

        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    except (ImportError, AttributeError):
        return None, 0, 0
    address, count, own, _ = detect(None, None, None, None, None, timeout)
    if address is None or count is None or own is None:
        raise BadInput(
            "config.distributed is set, but jax finds no cluster here (TPU slice, SLURM, "
            "Kubernetes, Open MPI): pass --coordinator=HOST:PORT --processes=N --process=I, or "
            "leave it unset on a lone machine."
        )
    return address, count, own


def keep_programs(folder: epath.PathLike) -> None:
    """Keeps what XLA compiles in a folder, where the next start of the same config finds it.

    JAX_COMPILATION_CACHE_DIR, where it is set, names another.  Process 0 alone writes, so that the
    folder has to be shared for the others to find anything.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", str(files.absolute(folder)))
    if files.is_remote(folder):  # XLA's own caches, on GPUs, know no buckets
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # A start compiles dozens of small programs besides the step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    warnings.showwarning = functools.partial(
        _without_damaged, epath.Path(folder), warnings.showwarning
    )


def _without_damaged(
    folder: epath.Path, show: Callable[..., None], message: Warning | str, *args: Any, **kwargs: Any
) -> None:
    """Shows a warning; removes the program that it says cannot be read.

    jax compiles it again, and then keeps the file that it finds: at every start anew.
    """
    found = re.match(r"Error reading persistent compilation cache entry for '(\w+)'", str(message))
    if found is None:
        show(message, *args, **kwargs)
    elif jax.process_index() == 0:
        logging.warning("a program in %s is damaged and compiled again: %s", folder, found[1])
        for path in folder.iterdir():
            if path.name.startswith(f"{found[1]}-"):
                path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- roll call


def roll_call(coordinator: str, processes: int, process: int, *, timeout: float) -> None:
    """Returns once every process has come; process 0 counts them at the coordinator's address.

    Raises:
      BadInput: in every process that is there: who is missing or came twice, or that process 0
        cannot be reached or cannot listen.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise BadInput(f"--coordinator={coordinator}: write HOST:PORT, as in 10.0.0.2:8476.")
    if processes == 1:
        return
    address = host.strip("[]"), int(port)
    if process == 0:
        _count(address, processes, timeout)
    else:
        _report(address, processes, process, timeout)


def _count(address: tuple[str, int], processes: int, timeout: float) -> None:
    """Process 0: listens until all the others have said their number, and tells them so."""
    deadline = time.monotonic() + timeout
    here = {0: socket.gethostname()}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(address[1]))
        except OSError as error:
            raise BadInput(
                f"Process 0 cannot listen on port {address[1]} ({error.strerror}): end the process "
                "that holds it, or choose another port in --coordinator."
            ) from error
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(server, selectors.EVENT_READ)
        waiting: list[socket.socket] = []
        verdict, told = "", time.monotonic()
        while len(here) < processes and not verdict:
            left = deadline - time.monotonic()
            if left <= 0:
                verdict = _missing(here, processes, timeout)
                break
            if time.monotonic() - told > 10:
                told = time.monotonic()
                logging.info("waiting for %d of %d processes", processes - len(here), processes)
            for key, _ in selector.select(min(left, 1.0)):
                if key.fileobj is server:
                    connection = stack.enter_context(server.accept()[0])
                    connection.settimeout(min(5.0, timeout))
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = key.fileobj
                selector.unregister(connection)
                hello = _read(connection, {"process": int, "processes": int, "host": str})
                if hello is None:  # a port scanner, or a process that went away again
                    continue
                waiting.append(connection)
                verdict = verdict or _check(hello, here, processes)
                here[hello["process"]] = hello["host"]
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.sendall((json.dumps({"verdict": verdict}) + "\n").encode())
        # The others hang up first, so that the port is free for jax at once.
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.recv(1)
    if verdict:
        raise BadInput(verdict)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
    return socket.create_server(("", port), backlog=1024)


def _report(address: tuple[str, int], processes: int, process: int, timeout: float) -> None:
    """Another process: says its number to process 0 and waits for the verdict."""
    deadline = time.monotonic() + timeout + _LEAD_GRACE
    hello = {"process": process, "processes": processes, "host": socket.gethostname()}
    reason = "it never answered"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=left) as connection:
                connection.sendall((json.dumps(hello) + "\n").encode())
                answer = _read(connection, {"verdict": str})
        except OSError as error:
            reason = str(error)
            time.sleep(min(_RETRY, left))
            continue
        if answer is not None and answer["verdict"]:
            raise BadInput(answer["verdict"])
        if answer is not None:
            return
        time.sleep(min(_RETRY, left))
    raise BadInput(
        f"Process {process} could not reach process 0 at {address[0]}:{address[1]} within "
        f"{timeout:g} s ({reason}): start it there, and let the port through the firewall."
    )


def _read(connection: socket.socket, expected: dict[str, type]) -> dict[str, Any] | None:
    """One JSON line with values of these types, or None from who does not speak like that."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _LINE:
            part = connection.recv(_LINE)
            if not part:
                return None
            data += part
        value = json.loads(data)
    except (OSError, ValueError):
        return None
    fits = isinstance(value, dict) and all(
        isinstance(value.get(name), kind) for name, kind in expected.items()
    )
    return value if fits else None


def _check(hello: dict[str, Any], here: dict[int, str], processes: int) -> str:
    """What is wrong with a process that came, "" if nothing is."""
    number, host = hello["process"], hello["host"]
    if hello["processes"] != processes:
        return (
            f"Process {number} on {host} was started with --processes={hello['processes']}, "
            f"process 0 with {processes}: start all of them with the same number."
        )
    if number in here:
        return (
            f"Process {number} came twice, from {here[number]} and from {host}: give each its own "
            "--process."
        )
    return ""


def _missing(here: dict[int, str], processes: int, timeout: float) -> str:
    absent = [i for i in range(processes) if i not in here]
    some = ", ".join(map(str, absent[:20])) + (", ..." if len(absent) > 20 else "")
    there = ", ".join(f"{i} on {here[i]}" for i in sorted(here)[:20])
    return (
        f"{len(absent)} of {processes} processes did not come within {timeout:g} s "
        f"(missing: {some}; there: {there}{', ...' if len(here) > 20 else ''}): start the missing "
        "ones and see their logs, or raise config.start_timeout."
    )


# ---------------------------------------------------------------------------- agreement


def agree(find: Callable[[], Any]) -> Any:
    """What host 0 finds, on every host: files that each host reads for itself may differ.

    Args:
      find: called on host 0 alone; returns what JSON can hold.

    Raises:
      BadInput: host 0's, on every host, so that none waits for one that has left.
    """
    if jax.process_count() == 1:
        return find()
    text = ""
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            text = json.dumps({"found": find()})
        except BadInput as error:
            text = json.dumps({"refused": str(error)})
        except Exception as error:  # noqa: BLE001  the others have to hear of it before it goes on
            failure = error
            text = json.dumps({"failed": f"process 0: {type(error).__name__}: {error}"})
    data = np.frombuffer(text.encode(), np.uint8)
    # Every host has to know the size of what it receives.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = multihost_utils.broadcast_one_to_all(np.resize(data, size))
    answer = json.loads(np.asarray(data, np.uint8).tobytes())
    if failure is not None:
        raise failure
    if "refused" in answer:
        raise BadInput(answer["refused"])
    if "failed" in answer:
        raise RuntimeError(answer["failed"])
    return answer["found"]


def all_or_none(do: Callable[[], Any]) -> Any:
    """This host's own result of ``do``, once every host has one.

    Raises:
      BadInput: on every host if on any, so that none waits for one that has left; RuntimeError on
        the others where it was something else.
    """
    if jax.process_count() == 1:
        return do()
    result: Any = None
    failure: Exception | None = None
    try:
        result = do()
    except Exception as error:  # noqa: BLE001  the others have to hear of it before it goes on
        failure = error
    # What is no fault of the input may go better the next time, and is no BadInput elsewhere.
    own = 0 if failure is None else 1 if isinstance(failure, BadInput) else 2
    states = multihost_utils.process_allgather(np.int32(own))
    if failure is not None:
        raise failure
    if states.any():
        kind = RuntimeError if states.max() == 2 else BadInput
        raise kind(f"Process {int(np.argmax(states))} cannot go on: see what it says.")
    return result

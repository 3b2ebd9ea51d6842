"""How the processes of a run start together, and agree; knows nothing of models or data."""

import contextlib
import functools
import json
import os
import re
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

from mofi_jax.common import console, files
from mofi_jax.common.errors import BadInput

_SENTENCE = 1024  # bytes of a failure that the other hosts get to see
_LINE = 4096  # longest line of the roll call
_RETRY = 0.2  # seconds between attempts to reach process 0
_LEAD_GRACE = 10.0  # seconds that the others wait longer than process 0, whose verdict names more


def start(distributed: bool, coordinator: str, processes: str, process: str, timeout: int) -> None:
    """Joins this process to the others and opens its devices; before any other call of jax.

    Args:
      distributed: ``config.distributed``; without it and the three below, the process is alone.
      coordinator: HOST:PORT of process 0, which listens there.
      processes, process: how many there are, and which one this is, from 0; all three are "" on a
        TPU slice, under SLURM, Kubernetes or Open MPI, where jax finds them.
      timeout: seconds to wait for the others (``config.start_timeout``).

    Raises BadInput: flags that do not fit together, no cluster, an address that is taken, processes
      that did not connect, by number, or no device of the wanted platform.
    """
    if not (distributed or coordinator or processes or process):
        devices()
        return
    flags = (coordinator, processes, process)
    if any(flags) and not all(flags):
        raise BadInput(
            "--coordinator, --processes and --process belong together: give all three, or none "
            "where jax finds them itself (TPU slice, SLURM, Kubernetes, Open MPI)."
        )
    explicit: tuple[Any, ...] = ()
    if all(flags):
        if not (processes + process).isdecimal() or int(process) >= int(processes):
            raise BadInput(
                f"--processes={processes} --process={process}: give the number of processes, and "
                "this one's own, counted from 0."
            )
        explicit = coordinator, int(processes), int(process)
    address, count, own = explicit or _detect(timeout)
    if address is not None:
        roll_call(address, count, own, timeout=timeout)
    jax.distributed.initialize(*explicit, initialization_timeout=timeout)
    devices()
    console.speak_first(jax.process_index())
    logging.info("%d processes have joined", jax.process_count())


def devices() -> list[jax.Device]:
    """All devices, of all processes; BadInput where JAX_PLATFORMS names what is not there."""
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


def _detect(timeout: int) -> tuple[str | None, int, int]:
    """Coordinator's address, number of processes and this one's, as jax would find them.

    jax has no public function for it.  Where it moves, the roll call is lost, not the start.
    """
    try:
        from jax._src import clusters

        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    except (ImportError, AttributeError):
        return None, 0, 0
    *found, _ = detect(None, None, None, None, None, timeout)
    if None in found:
        raise BadInput(
            "config.distributed is set, but jax finds no cluster here (TPU slice, SLURM, "
            "Kubernetes, Open MPI): pass --coordinator=HOST:PORT --processes=N --process=I, or "
            "leave it unset on a lone machine."
        )
    return tuple(found)


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
    if getattr(warnings.showwarning, "func", None) is not _replace_damaged:
        warnings.showwarning = functools.partial(_replace_damaged, warnings.showwarning)


def _replace_damaged(
    show: Callable[..., None], message: Warning | str, *args: Any, **kwargs: Any
) -> None:
    """Shows a warning, or removes the compiled program that it says cannot be read.

    jax compiles it again, but keeps a file that is there: it would at every start.
    """
    match = re.match(r"Error reading persistent compilation cache entry for '(\w+)'", str(message))
    if match is None:
        show(message, *args, **kwargs)
    elif jax.process_index() == 0:
        folder = epath.Path(jax.config.jax_compilation_cache_dir)
        logging.warning("a program in %s is damaged and compiled again: %s", folder, match[1])
        for path in folder.iterdir():
            if path.name.startswith(f"{match[1]}-"):
                path.unlink(missing_ok=True)


def roll_call(coordinator: str, processes: int, process: int, *, timeout: float) -> None:
    """Returns once all processes have connected to process 0, at the coordinator's address.

    Where a process is missing, or two have the same number, jax 0.10 aborts the others when its own
    timeout ends (exit code 134 and a C++ stack trace) and names none.

    Raises BadInput: in all that have connected: which are missing or started twice; no process 0.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise BadInput(f"--coordinator={coordinator}: write HOST:PORT, as in 10.0.0.2:8476.")
    if processes > 1 and process == 0:
        _count(int(port), processes, timeout)
    if processes == 1 or process == 0:
        return
    hello = json.dumps([process, processes, socket.gethostname()])
    deadline = time.monotonic() + timeout + _LEAD_GRACE
    reason: Exception = TimeoutError("no answer")
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), left) as connection:
                connection.sendall(f"{hello}\n".encode())
                verdict = json.loads(connection.makefile().readline(_LINE))
        except (OSError, ValueError) as error:  # not there yet, or another service
            reason = error
            time.sleep(min(_RETRY, left))
            continue
        if verdict:
            raise BadInput(verdict)
        return
    raise BadInput(
        f"Process {process} could not reach process 0 at {coordinator} within {timeout:g} s "
        f"({reason}): start it there, and open the port in the firewall."
    )


def _count(port: int, processes: int, timeout: float) -> None:
    """Process 0: listens until all the others have sent their number, and answers them."""
    deadline = time.monotonic() + timeout
    here, others, verdict = {0: socket.gethostname()}, [], ""
    both = socket.has_dualstack_ipv6()
    options = {"family": socket.AF_INET6, "dualstack_ipv6": True} if both else {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port), backlog=1024, **options))
        except OSError as error:
            raise BadInput(
                f"Process 0 cannot listen on port {port} ({error.strerror}): end the process that "
                "holds it, or choose another port in --coordinator."
            ) from error
        while len(here) < processes and not verdict and (left := deadline - time.monotonic()) > 0:
            server.settimeout(min(left, 10.0))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                logging.info("waiting for %d of %d processes", processes - len(here), processes)
                continue
            connection.settimeout(1.0)
            try:
                number, count, host = json.loads(connection.makefile().readline(_LINE))
                number, count = int(number), int(count)
            except (OSError, ValueError, TypeError, RecursionError):
                # A port scanner, or a process that ended.
                connection.close()  # one whose number comes late tries again
                continue
            others.append(connection)
            if count != processes:
                verdict = (
                    f"Process {number} on {host} was started with --processes={count}, process 0 "
                    f"with {processes}: start all of them with the same number."
                )
            elif number in here:
                verdict = (
                    f"Process {number} was started twice, on {here[number]} and on {host}: give "
                    "each its own --process."
                )
            here[number] = host
        missing = [str(i) for i in range(processes) if i not in here]
        if missing and not verdict:
            verdict = (
                f"{len(missing)} of {processes} processes did not connect within {timeout:g} s "
                f"(missing: {', '.join(missing[:20])}{', ...' * (len(missing) > 20)}): start them "
                "and see their logs, or raise config.start_timeout."
            )
        for connection in others:
            with contextlib.suppress(OSError):
                connection.sendall(f"{json.dumps(verdict)}\n".encode())
    if verdict:
        raise BadInput(verdict)


def agree(find: Callable[[], Any]) -> Any:
    """What host 0 finds, on every host: files that each host reads for itself may differ.

    Args:
      find: called on host 0 alone, as in `all_or_none`; returns what JSON can hold.
    """
    if jax.process_count() == 1:
        return find()
    text = all_or_none(lambda: json.dumps(find()) if jax.process_index() == 0 else "")
    data = np.frombuffer(text.encode(), np.uint8)
    # Every host has to know the size of what it receives.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = multihost_utils.broadcast_one_to_all(np.resize(data, size))
    return json.loads(np.asarray(data, np.uint8).tobytes())


def all_or_none(do: Callable[[], Any]) -> Any:
    """This host's own result of ``do``, once every host has one.

    Raises BadInput on every host if on any, so that none waits for one that has ended; RuntimeError
    on the others where it was something else, which may go better the next time.
    """
    if jax.process_count() == 1:
        return do()
    result: Any = None
    failure: Exception | None = None
    text = ""
    try:
        result = do()
    except Exception as error:  # noqa: BLE001  the others have to know before it goes on
        failure = error
        kind = "" if isinstance(error, BadInput) else f"{type(error).__name__}: "
        text = f"{'!' if kind else ' '}{kind}{error}"
    own = np.frombuffer(text.encode()[:_SENTENCE].ljust(_SENTENCE, b"\0"), np.uint8)
    texts = multihost_utils.process_allgather(own)
    if failure is not None:
        raise failure
    if texts.any():
        process = int(np.argmax(texts.any(axis=1)))
        text = texts[process].tobytes().rstrip(b"\0").decode(errors="ignore")
        raise (RuntimeError if text[0] == "!" else BadInput)(f"process {process}: {text[1:]}")
    return result

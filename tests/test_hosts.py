"""Start-up: who is missing is named, in every process that is there."""

import concurrent.futures
import functools
import os
import socket
import threading
import warnings

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import hosts, meshes


@pytest.fixture
def port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def call(port, processes, who, timeout=20.0):
    """The roll call of some processes, as threads; what each of them raised."""

    def one(process):
        try:
            hosts.roll_call(f"localhost:{port}", processes, process, timeout=timeout)
        except BadInput as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(who)) as pool:
        return list(pool.map(one, who))


def test_everybody_comes(port):
    assert call(port, 4, [3, 0, 2, 1]) == [""] * 4
    # The port is free at once, for jax itself.
    assert call(port, 2, [0, 1]) == [""] * 2


def test_the_missing_are_named_in_every_process_that_came(port):
    told = call(port, 5, [0, 1, 3], timeout=1.0)
    here = socket.gethostname()
    for message in told:
        assert message.startswith("2 of 5 processes did not come within 1 s (missing: 2, 4; there:")
        assert f"0 on {here}, 1 on {here}, 3 on {here}" in message


def test_two_of_one_number(port):
    told = call(port, 3, [0, 1, 1])
    assert all(message.startswith("Process 1 came twice, from") for message in told)


def test_another_number_of_processes(port):
    def join(processes, process):
        try:
            hosts.roll_call(f"localhost:{port}", processes, process, timeout=20.0)
        except BadInput as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        lead, other = pool.submit(join, 3, 0), pool.submit(join, 2, 1)
    for told in (lead.result(), other.result()):
        assert "was started with --processes=2, process 0 with 3" in told


def test_no_lead(port, monkeypatch):
    monkeypatch.setattr(hosts, "_LEAD_GRACE", 0.0)
    [told] = call(port, 2, [1], timeout=0.5)
    assert told.startswith(f"Process 1 could not reach process 0 at localhost:{port} within 0.5 s")


def test_a_port_that_is_taken(port):
    with socket.create_server(("", port)), pytest.raises(BadInput, match=f"listen on port {port}"):
        hosts.roll_call(f"localhost:{port}", 2, 0, timeout=1.0)


def test_strangers_at_the_port_are_ignored(port):
    """Something that connects and talks another language, or nothing at all, is no process."""

    def stranger():
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"", b'{"verdict": 3}\n', b"[1]\n"):
            for _ in range(200):
                try:
                    with socket.create_connection(("localhost", port), timeout=1) as connection:
                        connection.sendall(words)
                    break
                except OSError:
                    threading.Event().wait(0.02)

    thread = threading.Thread(target=stranger)
    thread.start()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        lead = pool.submit(hosts.roll_call, f"localhost:{port}", 2, 0, timeout=20.0)
        thread.join()
        pool.submit(hosts.roll_call, f"localhost:{port}", 2, 1, timeout=20.0).result()
        lead.result()


@pytest.mark.parametrize("address", ["localhost", "localhost:http", ":8476", "localhost:99999"])
def test_addresses(address):
    with pytest.raises(BadInput, match="write HOST:PORT"):
        hosts.roll_call(address, 2, 0, timeout=1.0)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("localhost:1", "2", ""), "belong together"),
        (("localhost:1", "two", "0"), "--processes=two"),
        (("localhost:1", "2", "2"), "counted from 0"),
        (("", "", ""), "finds no cluster here"),
    ],
)
def test_flags(flags, sentence):
    coordinator, processes, process = flags
    with pytest.raises(BadInput, match=sentence):
        hosts.start(True, coordinator=coordinator, processes=processes, process=process, timeout=1)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (AssertionError(), r"\(there are none\)"),
        (RuntimeError("Backend 'x' is not in the list of known backends: (set X)"), "known backen"),
    ],
)
def test_devices_that_are_not_there_are_named(monkeypatch, failure, reason):
    def fail():
        raise failure

    monkeypatch.setattr(jax, "devices", fail)
    alone = functools.partial(hosts.start, False, coordinator="", processes="", process="")
    for call in (meshes.make_mesh, functools.partial(alone, timeout=1)):
        with pytest.raises(BadInput, match=f"JAX_PLATFORMS=.* use here .*{reason}.*: unset it"):
            call()


def test_a_device_that_is_taken_may_be_free_later(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu': it is in use by process 7")

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(RuntimeError, match="in use"):
        hosts.devices()


def test_a_lone_process_starts_nothing():
    hosts.start(False, coordinator="", processes="", process="", timeout=1)


# ---------------------------------------------------------------------------- agreement


def as_two_hosts(monkeypatch, find):
    """What `hosts.agree` gives on host 0 and on host 1, whose own look would find nothing."""
    sent, results = [], []
    received = None

    def broadcast(array):
        if received is None:
            sent.append(array)
            return array
        expected = received.pop(0)
        assert array.shape == expected.shape  # as the real one demands
        return expected

    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", broadcast)
    for process in (0, 1):
        monkeypatch.setattr(hosts.jax, "process_index", lambda process=process: process)
        try:
            results.append(hosts.agree(find if process == 0 else lambda: 1 / 0))
        except Exception as error:
            results.append(error)
        received = list(sent)
    return results


@pytest.mark.parametrize(
    "found", [None, 3, {"step": 4, "position": {"examples": 10**12}}, "é" * 99]
)
def test_every_host_gets_what_host_0_finds(monkeypatch, found):
    assert as_two_hosts(monkeypatch, lambda: found) == [found, found]


def test_every_host_gets_the_sentence_of_host_0(monkeypatch):
    def refuse():
        raise BadInput("no")

    assert [repr(e) for e in as_two_hosts(monkeypatch, refuse)] == ["BadInput('no')"] * 2


def test_no_host_waits_for_one_that_failed(monkeypatch):
    ours, theirs = as_two_hosts(monkeypatch, lambda: os.stat("/proc/nothing"))
    assert isinstance(ours, FileNotFoundError)
    assert isinstance(theirs, RuntimeError)
    assert "process 0: FileNotFoundError: " in str(theirs)
    assert "/proc/nothing" in str(theirs)


def test_a_lone_host_asks_nobody():
    assert hosts.agree(lambda: 4) == 4


@pytest.mark.parametrize(
    ("failure", "states", "raised", "said"),
    [
        (None, [0, 0], None, ""),
        (None, [0, 1], BadInput, "Process 1 cannot go on"),
        (None, [0, 2], RuntimeError, "Process 1 cannot go on"),
        (BadInput("no such folder"), [1, 0], BadInput, "no such folder"),
        (OSError("stale"), [2, 0], OSError, "stale"),
    ],
)
def test_one_host_that_fails_takes_all_with_it(monkeypatch, failure, states, raised, said):
    """As process 0 of two."""
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    told = []
    gather = lambda own: told.append(own) or np.array(states)  # noqa: E731
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)

    def do():
        if failure is not None:
            raise failure
        return 3

    if raised is None:
        assert hosts.all_or_none(do) == 3
    else:
        with pytest.raises(raised, match=said):
            hosts.all_or_none(do)
    assert told == states[:1]


def test_a_damaged_program_is_replaced(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    kept = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in kept}

    def compile_anew():
        compilation_cache.reset_cache()

        def kept_program(x):
            return x * 3 + 1

        assert jax.jit(kept_program)(2) == 7
        [path] = tmp_path.glob("jit_kept_program-*-cache")
        return path

    try:
        hosts.keep_programs(tmp_path)
        jax.config.update(kept[1], 0.0)
        path = compile_anew()
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        compile_anew()
        assert "is damaged and compiled again: jit_kept_program" in caplog.text
        assert len(path.read_bytes()) > len(whole) // 2
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

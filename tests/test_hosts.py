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
    for message in told:
        assert message.startswith("2 of 5 processes did not connect within 1 s (missing: 2, 4)")


def test_two_of_one_number(port):
    told = call(port, 3, [0, 1, 1])
    assert all(message.startswith("Process 1 was started twice, on") for message in told)


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
        for words in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"",
            b'{"verdict": 3}\n',
            b"[1]\n",
            b"[[1], 2, 3]\n",
            b"[" * 4_000,
        ):
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


def test_a_process_that_was_not_understood_can_try_again(port):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        lead = pool.submit(hosts.roll_call, f"localhost:{port}", 2, 0, timeout=20.0)
        for _ in range(200):
            try:
                connection = socket.create_connection(("localhost", port), timeout=5)
                break
            except OSError:
                threading.Event().wait(0.02)
        with connection:
            connection.sendall(b"half a hel\n")
            hung_up = connection.recv(1) == b""
        hosts.roll_call(f"localhost:{port}", 2, 1, timeout=20.0)
        lead.result()
    assert hung_up


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


def as_two_hosts(monkeypatch, call, *does):
    """What `call` returns or raises on each of two hosts, which are threads."""
    barrier, places = threading.Barrier(2), threading.local()
    sent = [None, None]

    def gather(array):
        sent[places.process] = array
        barrier.wait()
        received = list(sent)
        barrier.wait()
        assert received[0].shape == received[1].shape  # as the real ones demand
        return received

    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.jax, "process_index", lambda: places.process)
    utils = hosts.multihost_utils
    monkeypatch.setattr(utils, "process_allgather", lambda array: np.stack(gather(array)))
    monkeypatch.setattr(utils, "broadcast_one_to_all", lambda array: gather(array)[0])

    def one(process):
        places.process = process
        try:
            return call(does[process])
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def raises(error):
    def do():
        raise error

    return do


@pytest.mark.parametrize(
    "found", [None, 3, {"step": 4, "position": {"examples": 10**12}}, "é" * 99]
)
def test_every_host_gets_what_host_0_finds(monkeypatch, found):
    assert as_two_hosts(monkeypatch, hosts.agree, lambda: found, lambda: 1 / 0) == [found, found]


def test_every_host_gets_the_sentence_of_host_0(monkeypatch):
    found = as_two_hosts(monkeypatch, hosts.agree, raises(BadInput("no")), lambda: 1 / 0)
    assert list(map(repr, found)) == ["BadInput('no')", "BadInput('process 0: no')"]


def test_no_host_waits_for_one_that_failed(monkeypatch):
    failing = lambda: os.stat("/proc/nothing")  # noqa: E731
    ours, theirs = as_two_hosts(monkeypatch, hosts.agree, failing, lambda: 1 / 0)
    assert isinstance(ours, FileNotFoundError)
    assert isinstance(theirs, RuntimeError)
    assert "process 0: FileNotFoundError: " in str(theirs)
    assert "/proc/nothing" in str(theirs)


def test_a_lone_host_asks_nobody():
    assert hosts.agree(lambda: 4) == 4


@pytest.mark.parametrize(
    ("failure", "theirs"),
    [
        (BadInput("no such folder"), "BadInput('process 1: no such folder')"),
        (OSError("stale " * 999), "RuntimeError('process 1: OSError: stale "),
    ],
)
def test_one_host_that_fails_takes_all_with_it(monkeypatch, failure, theirs):
    found = as_two_hosts(monkeypatch, hosts.all_or_none, lambda: 3, raises(failure))
    assert repr(found[0]).startswith(theirs)
    assert found[1] is failure


def test_every_host_gets_its_own_result(monkeypatch):
    assert as_two_hosts(monkeypatch, hosts.all_or_none, lambda: 3, lambda: 4) == [3, 4]


def test_a_damaged_program_is_replaced(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    shown = warnings.showwarning
    monkeypatch.setattr(warnings, "showwarning", shown)
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
        hosts.keep_programs(tmp_path / "of another run")
        hosts.keep_programs(tmp_path)
        assert warnings.showwarning.args == (shown,)  # one layer, however many runs there were
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

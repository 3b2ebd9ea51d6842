"""The watchdog: a hung host prints its stacks, whatever moves is no hang."""

import threading
import time

from mofi_jax import telemetry
from mofi_jax.telemetry import watchdog as watchdog_module


def stall(event):
    event.wait()


def test_a_hung_host_prints_its_stacks_again_and_again(capfd):
    event, text, deadline = threading.Event(), "", time.monotonic() + 20
    stalled = threading.Thread(target=stall, args=(event,))
    stalled.start()
    watchdog = telemetry.Watchdog(minutes=0.1 / 60)
    while text.count("Timeout") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
        text += capfd.readouterr().err
    watchdog.close()
    event.set()
    stalled.join()
    assert text.count("Timeout") >= 2
    assert "in stall" in text  # another thread's stack
    assert "in test_a_hung_host_prints_its_stacks_again_and_again" in text  # and the main one's


def test_progress_begins_the_wait_anew_and_zero_minutes_is_off(monkeypatch):
    waits = []
    monkeypatch.setattr(
        watchdog_module.faulthandler,
        "dump_traceback_later",
        lambda seconds, **_: waits.append(seconds),
    )
    telemetry.Watchdog(minutes=2.0).progress()
    assert waits == [120, 120]
    telemetry.Watchdog(minutes=0.0).progress()
    assert waits == [120, 120]
    telemetry.Watchdog(minutes=1e300)
    assert waits[2] == threading.TIMEOUT_MAX

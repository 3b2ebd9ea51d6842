"""Random inputs to a reader of strangers' files, and what one of them may cost.

FUZZ_EXAMPLES=100000 searches longer than the suite has time for.
"""

import functools
import os
import re
import time

import hypothesis
from hypothesis import strategies as st

SECONDS = 5
BYTES = 512 << 20  # of resident memory that one example may add
_CHECKS = hypothesis.HealthCheck


def fuzz(examples: int, **strategies):
    """A test of `examples` inputs, none of which takes more than `SECONDS` or `BYTES`.

    Seconds of the processor: what else the machine does changes nothing.
    """

    def decorate(test):
        @functools.wraps(test)
        def limited(*args, **drawn):
            before = _memory("VmRSS")
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak counts from here on
            started = time.process_time()
            test(*args, **drawn)
            seconds = time.process_time() - started
            grown = _memory("VmHWM") - before
            assert grown <= BYTES, f"{grown >> 20} MB for one example"
            assert seconds <= SECONDS, f"{seconds:.0f} s for one example"

        settings = hypothesis.settings(
            max_examples=int(os.environ.get("FUZZ_EXAMPLES", examples)),
            deadline=None,
            suppress_health_check=[_CHECKS.too_slow, _CHECKS.data_too_large],
        )
        return settings(hypothesis.given(**strategies)(limited))

    return decorate


def _memory(name: str) -> int:
    """Bytes of resident memory: now (`VmRSS`), or the peak (`VmHWM`)."""
    with open("/proc/self/status") as file:
        return int(re.search(rf"{name}:\s+(\d+) kB", file.read())[1]) << 10


@st.composite
def mutated(draw, sound, tokens):
    """One of the `sound` files with bytes changed, cut out, repeated or put in.

    `tokens` are bytes that mean something to the reader.
    """
    data = bytearray(draw(st.sampled_from(sound)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["token", "over", "flip", "cut", "insert", "repeat"])):
            case "token":
                data[at:at] = draw(st.sampled_from(tokens))
            case "over":
                token = draw(st.sampled_from(tokens))
                data[at : at + len(token)] = token
            case "flip":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[at : at + draw(st.integers(1, 50))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=20))
            case "repeat":
                data[at:at] = data[at : at + 100] * draw(st.integers(1, 5))
    return bytes(data)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda some: (
        st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=4), some, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def altered(draw, whole):
    """The JSON value `whole` with another value at one place in it."""

    def places(value, path=()):
        yield path
        if isinstance(value, dict | list):
            for key in value if isinstance(value, dict) else range(len(value)):
                yield from places(value[key], (*path, key))

    def replaced(value, path, new):
        if not path:
            return new
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[path[0]] = replaced(value[path[0]], path[1:], new)
        return copy

    return replaced(whole, draw(st.sampled_from(list(places(whole)))), draw(json_values))

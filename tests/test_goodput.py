"""The goodput clock: every second in one phase, across restarts."""

import json
import threading
import time

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from mofi_jax import telemetry
from tests.test_telemetry import Clock


def rounded(seconds):
    return {phase: pytest.approx(value, abs=1e-6) for phase, value in seconds.items() if value}


def test_every_moment_belongs_to_one_phase():
    clock = Clock()
    goodput = telemetry.Goodput(started=clock.now - 7, clock=clock, wall=clock)
    clock.now += 3
    goodput.enter("step")
    clock.now += 10
    with goodput.phase("eval"):
        clock.now += 20
        with goodput.phase("input"):
            clock.now += 2
        clock.now += 1
    clock.now += 5
    goodput.close()
    seconds = goodput.seconds()
    assert {p: s for p, s in seconds.items() if s} == rounded(
        {"start": 10, "step": 15, "eval": 21, "input": 2}
    )
    assert sum(goodput.shares().values()) == pytest.approx(1)
    assert "goodput 31.2 % of 0:00:48" in goodput.line()


def test_a_phase_ends_with_an_exception_too():
    clock = Clock()
    goodput = telemetry.Goodput(clock=clock, wall=clock)

    def fail():
        clock.now += 4
        raise KeyError

    with pytest.raises(KeyError), goodput.phase("eval"):
        fail()
    clock.now += 1
    goodput.close()
    assert (goodput.seconds()["eval"], goodput.seconds()["start"]) == (4, 1)


def test_compilation_is_taken_from_the_phase_in_which_it_happens():
    """Inner programs are reported before the outer one that contains them, and count once."""
    clock = Clock()
    goodput = telemetry.Goodput(clock=clock, wall=clock)
    goodput.enter("step")
    clock.now += 3
    goodput.compiled(1.0)  # [1002, 1003]
    clock.now += 2
    goodput.compiled(0.5)  # [1004.5, 1005]
    clock.now += 1
    goodput.compiled(5.0)  # [1001, 1006] holds both
    goodput.close()
    assert (goodput.seconds()["compile"], goodput.seconds()["step"]) == pytest.approx((5, 1))


def test_hears_what_jax_compiles_in_its_own_thread():
    goodput = telemetry.Goodput()

    def compile_something(x):
        # A program of its own each time: two tests in one process must not share it.
        return jax.jit(lambda a: jnp.sin(a) * time.monotonic())(x)

    other = threading.Thread(target=compile_something, args=(jnp.ones(3),))
    before = goodput.seconds()["compile"]
    other.start()
    other.join()
    assert goodput.seconds()["compile"] == before
    with goodput.phase("eval"):
        compile_something(jnp.ones(3))
    heard = goodput.seconds()["compile"]
    assert heard > before
    goodput.close()
    compile_something(jnp.ones(3))
    assert goodput.seconds()["compile"] == heard
    assert goodput.seconds()["eval"] >= 0


class Run:
    """A run of fake processes: trains, saves, dies, and comes back in the same folder."""

    def __init__(self, workdir):
        self.workdir, self.clock, self.saved = workdir, Clock(5e8), {}
        self.first_start = self.clock.now

    def start(self, imports=2.0):
        began = self.clock.now
        self.clock.now += imports
        self.goodput = telemetry.Goodput(began, clock=self.clock, wall=self.clock)
        self.goodput.resume(self.workdir, self.saved)
        self.goodput.enter("step")

    def work(self, phase, seconds):
        with self.goodput.phase(phase):
            self.clock.now += seconds

    def save(self):
        self.saved = json.loads(json.dumps(self.goodput.save()))

    def die(self, unseen=0.0, down=0.0):
        """``unseen``: seconds of the present phase that no heartbeat has written."""
        self.goodput.save()
        self.clock.now += unseen + down
        self.goodput._path = None  # it cannot write any more
        self.goodput.close()

    def check(self):
        seconds = self.goodput.seconds()
        assert sum(seconds.values()) == pytest.approx(self.clock.now - self.first_start, abs=1e-3)
        assert all(value >= -1e-6 for value in seconds.values())
        return {phase: value for phase, value in seconds.items() if value > 1e-6}


def test_what_came_after_the_last_checkpoint_was_lost(tmp_path):
    run = Run(tmp_path)
    run.start()
    run.work("step", 100)
    run.work("checkpoint", 1)
    run.save()
    run.work("input", 5)
    run.work("step", 40)
    run.work("eval", 10)
    run.die(unseen=3, down=200)
    run.start()
    assert run.check() == rounded(
        {"start": 4, "step": 100, "checkpoint": 1, "lost": 55, "down": 203}
    )
    # Killed again before another checkpoint: what was lost and down stays so.
    run.work("step", 7)
    run.die(down=50)
    run.start()
    assert run.check() == rounded(
        {"start": 6, "step": 100, "checkpoint": 1, "lost": 62, "down": 253}
    )


def test_a_run_that_saved_before_it_was_stopped_lost_nothing(tmp_path):
    run = Run(tmp_path)
    run.start()
    run.work("step", 100)
    run.save()
    run.work("checkpoint", 30)
    run.die(down=10)
    run.start()
    assert run.check() == rounded({"start": 4, "step": 100, "checkpoint": 30, "down": 10})


def test_killed_before_the_first_checkpoint(tmp_path):
    run = Run(tmp_path)
    run.start()
    run.work("step", 100)
    run.die(down=10)
    run.start()
    assert run.check() == rounded({"start": 4, "lost": 100, "down": 10})


def test_a_finished_run_that_goes_on_was_not_down(tmp_path):
    run = Run(tmp_path)
    run.start()
    run.work("step", 100)
    run.save()
    run.goodput.finish()
    run.die(down=1e6)
    run.start()
    seconds = run.goodput.seconds()
    assert {p: s for p, s in seconds.items() if s} == rounded({"start": 4, "step": 100})
    # And from then on like any other.
    run.work("step", 50)
    run.save()
    run.die(down=30)
    run.start()
    assert run.goodput.seconds()["down"] == pytest.approx(30)
    assert sum(run.goodput.seconds().values()) == pytest.approx(186)
    run.goodput.close()


@hypothesis.given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["input", "step", "eval", "checkpoint"]), st.floats(0, 1e5)),
            st.just(("save", 0.0)),
            st.tuples(st.just("die"), st.floats(0, 1e5)),
            st.tuples(st.just("compile"), st.floats(0, 100)),
        ),
        max_size=30,
    )
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_history_sums_to_the_wall_time(tmp_path_factory, history):
    run = Run(tmp_path_factory.mktemp("run"))
    run.start()
    trained = saved = compiled = 0.0
    for what, amount in history:
        if what == "die":
            run.die(unseen=1.0, down=amount)
            run.start()
            trained = saved
        elif what == "save":
            run.save()
            saved = trained
        elif what == "compile":
            run.clock.now += amount
            run.goodput.compiled(amount)
            compiled += amount
        else:
            run.work(what, amount)
            trained += amount * (what in ("input", "step"))
        run.check()
    seconds = run.goodput.seconds()
    assert seconds["input"] + seconds["step"] == pytest.approx(trained, abs=1e-3)
    assert seconds["compile"] == pytest.approx(compiled, abs=1e-3)
    run.goodput.close()


@pytest.mark.parametrize("text", [None, "", '{"seconds": {}}', "[]"])
def test_without_a_readable_goodput_file_the_time_down_is_unknown(tmp_path, text):
    run = Run(tmp_path)
    run.start()
    run.work("step", 100)
    run.save()
    run.die(down=1000)
    path = tmp_path / telemetry.GOODPUT_FILE
    path.unlink() if text is None else path.write_text(text)
    run.start()
    seconds = run.goodput.seconds()
    run.goodput.close()
    assert {p: s for p, s in seconds.items() if s} == rounded({"start": 4, "step": 100})


def test_a_clock_set_back_takes_nothing_away(tmp_path):
    run = Run(tmp_path)
    run.start()
    run.work("step", 100)
    run.save()
    run.die()
    run.clock.now -= 5000
    run.start()
    assert run.goodput.seconds()["down"] == 0
    assert run.goodput.seconds()["step"] == pytest.approx(100)
    run.goodput.close()


def test_heartbeats_are_rare(tmp_path):
    run = Run(tmp_path)
    run.start()

    def written():
        return json.loads((tmp_path / telemetry.GOODPUT_FILE).read_text())["seconds"]["step"]

    run.work("step", 4)
    run.goodput.heartbeat()
    assert written() == 0
    run.work("step", 8)
    run.goodput.heartbeat()
    assert written() == pytest.approx(12)
    run.goodput.close()

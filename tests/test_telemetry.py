"""Metrics one step late, files whole or not at all."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mofi_jax import telemetry
from mofi_jax.errors import BadInput


def test_writes_one_push_late(tmp_path):
    metrics = telemetry.Metrics(tmp_path, resume_step=0)
    assert metrics.push(1, {"loss": jnp.float32(2.0)}) == {}
    assert telemetry.read_metrics(tmp_path) == []
    assert metrics.push(2, {"loss": jnp.float32(1.0)}) == {"loss": 2.0}
    metrics.close()
    assert telemetry.read_metrics(tmp_path) == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_resuming_drops_later_and_broken_lines(tmp_path):
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in (1, 2, 3)]
    (tmp_path / telemetry.METRICS_FILE).write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert len(telemetry.read_metrics(tmp_path)) == 3
    telemetry.Metrics(tmp_path, resume_step=2).close()
    assert [line["step"] for line in telemetry.read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_written_and_stops(tmp_path, value):
    metrics = telemetry.Metrics(tmp_path, resume_step=0)
    metrics.push(7, {"loss": jnp.float32(value)})
    with pytest.raises(BadInput, match="at step 7"):
        metrics.flush()
    assert telemetry.read_metrics(tmp_path)[0]["step"] == 7


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    telemetry.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        telemetry.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]

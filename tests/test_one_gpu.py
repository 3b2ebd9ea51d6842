"""What is measured on a GPU: the choice between attentions, and the model that PyTorch gets."""

import json
import time

import pytest

from benchmarks import one_gpu, torch_vit, train_step
from benchmarks.step_case import Case
from mofi_jax.model import mofi


def of(variant, **milliseconds):
    def figure(tokens, name, value):
        what = f"attention {variant}, {tokens} tokens, B=256, {name}"
        return {"bar": what, "unit": "ms", "value": value}

    return [
        *(figure(257, name, value) for name, value in milliseconds.items()),
        *(figure(77, name, 0.1) for name in milliseconds if name != "split"),
        {"bar": "  gradients, split vs float32", "unit": "rel", "value": 0.0},
    ]


@pytest.mark.parametrize(
    ("figures", "chosen"),
    [
        (of("L/14", xla=4.0, cudnn=1.9, split=1.5), "split"),
        (of("L/14", xla=4.0, cudnn=1.4, split=1.5), "auto"),
        (of("H/14", cudnn=1.9, split=1.5), "auto"),  # another's
        (of("L/14", cudnn=1.9), "auto"),
        ([], "auto"),
    ],
)
def test_the_faster_attention_of_the_image_tower(figures, chosen):
    assert one_gpu.faster(figures, "L/14") == chosen


@pytest.mark.parametrize(
    ("wanted", "code", "well"),
    [
        ({"rate": 2, "time": 1}, 0, True),
        ({"rate": 3}, 0, False),  # one is missing
        ({"speed": 1}, 0, False),
        ({"rate": 2}, 1, False),  # one does not hold
    ],
)
def test_a_part_ends_well_with_all_its_figures(monkeypatch, tmp_path, capsys, wanted, code, well):
    lines = [json.dumps({"bar": name}) for name in ("rate of a", "rate of b", "time")]
    (tmp_path / "a_part.py").write_text(
        f"import sys\nprint('a table', *{lines}, sep='\\n')\nsys.exit({code})"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    figures, found = one_gpu.run(time.monotonic() + 60, wanted, "a_part")
    assert [figure["bar"] for figure in figures] == ["rate of a", "rate of b", "time"]
    assert found is well
    assert "a table" in capsys.readouterr().out


@pytest.mark.parametrize("variant", one_gpu.VARIANTS)
def test_pytorch_gets_the_same_tower(variant):
    case = Case(variant=variant, task="supervised", batch=8, entities=9)
    given = torch_vit.Case(**train_step.torch_case(case))
    tower = mofi.VARIANTS[variant]["image"]
    assert (given.width, given.layers, given.heads) == (tower.width, tower.layers, tower.heads)
    assert tower.hidden_width == 4 * given.width  # as its blocks have it

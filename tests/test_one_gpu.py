"""The choice between attentions by the figures of a GPU."""

import pytest

from benchmarks import one_gpu


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

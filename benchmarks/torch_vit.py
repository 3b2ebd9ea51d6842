"""The supervised step in PyTorch, for comparison: same model, batch and optimiser.

    python -m benchmarks.torch_vit '{"width": 768, "layers": 12, "heads": 12, ...}'

Prints one JSON object.  torch.compile, bf16 autocast (which keeps the stream between the blocks in
float32; `mofi_jax` has it in bf16), scaled_dot_product_attention and fused AdamW, as is usual.  The
image tower is timm's ViT in its CLIP form where timm is installed, else the same architecture from
below; the head is CosFace over all entities, as one would write it in PyTorch.
"""

import dataclasses
import importlib.util
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SCALE, MARGIN = 32.0, 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    """Shape of the image tower, sizes of a step; ``groups`` groups of ``steps`` are timed."""

    width: int
    layers: int
    heads: int
    patch_size: int
    image_size: int
    embed_dim: int
    batch: int
    entities: int
    dtype: str
    groups: int
    steps: int


class Block(nn.Module):
    """Pre-LN transformer block with one product for query, key and value."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, w = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, w // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).reshape(b, n, w))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class ImageTower(nn.Module):
    """Normalised pictures [b, 3, s, s] -> [b, embed_dim]; the architecture of `mofi_jax.model`."""

    def __init__(self, case: Case):
        super().__init__()
        width, side = case.width, case.image_size // case.patch_size
        self.patches = nn.Conv2d(3, width, case.patch_size, case.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.positions = nn.Parameter(torch.randn(1, side**2 + 1, width) * 0.01)
        self.pre_norm, self.post_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width, case.heads) for _ in range(case.layers)))
        self.projection = nn.Linear(width, case.embed_dim, bias=False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = self.patches(pictures).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = self.blocks(self.pre_norm(x))
        return self.projection(self.post_norm(x[:, 0]))


def make_tower(case: Case) -> tuple[nn.Module, str]:
    """The tower and where it comes from."""
    if importlib.util.find_spec("timm") is None:
        return ImageTower(case), "this file"
    from timm.models import vision_transformer

    tower = vision_transformer.VisionTransformer(
        img_size=case.image_size,
        patch_size=case.patch_size,
        embed_dim=case.width,
        depth=case.layers,
        num_heads=case.heads,
        num_classes=case.embed_dim,
        global_pool="token",
        pre_norm=True,
    )
    return tower, "timm"


class Supervised(nn.Module):
    """uint8 pictures and entity ids -> mean CosFace loss."""

    def __init__(self, case: Case):
        super().__init__()
        self.tower, self.source = make_tower(case)
        self.table = nn.Parameter(torch.randn(case.entities, case.embed_dim) * 0.01)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, pictures: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        pictures = (pictures.float() / 255 - self.mean) / self.std
        embeddings = functional.normalize(self.tower(pictures).float())
        cosines = functional.linear(embeddings, functional.normalize(self.table)).float()
        margins = torch.zeros_like(cosines).scatter_(1, ids[:, None], MARGIN)
        return functional.cross_entropy(SCALE * (cosines - margins), ids)


def measure(case: Case) -> dict[str, Any]:
    """Times the step.

    Returns:
      seconds: of a step, the median of the groups; tower: "timm" or "this file"; compiled: False
      where torch.compile found no compiler; loss: of the last step.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Supervised(case).to(device)
    vectors = [p for p in model.parameters() if p.ndim < 2 or p is model.table]
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p is not model.table]
    groups = [
        {"params": matrices, "weight_decay": 0.2},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
    shape = case.batch, 3, case.image_size, case.image_size
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    ids = torch.randint(0, case.entities, (case.batch,), device=device)

    def make_step(forward: Any) -> Any:
        def step() -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
                loss = forward(pictures, ids)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        return step

    compiled = True
    step = make_step(torch.compile(model))
    try:
        step()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of which all of the compiler's are kinds
        print(f"torch.compile does not work here, eager instead: {error!r:.300}", file=sys.stderr)
        compiled = False
        step = make_step(model)
    seconds = []
    for group in range(case.groups + 1):
        start = time.perf_counter()
        for _ in range(case.steps):
            loss = step()
        value = loss.item()  # waits for the device
        if group:  # the first one warms up
            seconds.append((time.perf_counter() - start) / case.steps)
    return {
        "seconds": statistics.median(seconds),
        "tower": model.source,
        "compiled": compiled,
        "loss": value,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))

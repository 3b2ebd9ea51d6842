"""The parameters of both towers under the names and in the layout of transformers' SiglipModel.

The table for `clip_weights`, whose functions move them in both directions; the names are those of
transformers' modeling_siglip.py.
"""

from collections.abc import Iterator

from mofi_jax.interop.clip_weights import Weight, blocks, norm, projections
from mofi_jax.model import mofi


def weights(
    config: mofi.MofiConfig, *, text: bool = True, naflex: bool = False
) -> Iterator[Weight]:
    """All parameters of both towers, or without `text` of SiglipVisionModel alone.

    With `naflex` those of Siglip2Model, which takes patches cut by the preprocessing.
    """
    w, t, p = config.image.width, config.text.width, config.patch_size
    vision = "vision_model."
    name = vision + "embeddings."
    kernel = ("image/patch_embedding/kernel", name + "patch_embedding.weight", (p, p, 3, w))
    yield Weight(*kernel, "matrix", inputs=3) if naflex else Weight(*kernel, "patches")
    yield Weight("image/patch_embedding/bias", name + "patch_embedding.bias", (w,))
    positions = (config.image_size // p) ** 2
    yield Weight("image/position_embedding", name + "position_embedding.weight", (positions, w))
    yield from blocks("image/blocks/", vision, config.image)
    yield from norm("image/post_norm", vision + "post_layernorm", w)
    yield from _head("image/head/", vision + "head.", config.image)
    if not text:
        return

    # Arrays of one number there.
    yield Weight("logit_scale", "logit_scale", (), "bias")
    yield Weight("logit_bias", "logit_bias", (), "bias")
    name = "text_model.embeddings."
    shape = (config.vocab_size, t)
    yield Weight("text/token_embedding", name + "token_embedding.weight", shape)
    shape = (config.context_length, t)
    yield Weight("text/position_embedding", name + "position_embedding.weight", shape)
    yield from blocks("text/blocks/", "text_model.", config.text)
    yield from norm("text/final_norm", "text_model.final_layer_norm", t)
    shape = (t, config.embed_dim)
    yield Weight("text/projection/kernel", "text_model.head.weight", shape, "matrix")
    yield Weight("text/projection/bias", "text_model.head.bias", shape[1:])


def _head(path: str, name: str, tower: mofi.TowerConfig) -> Iterator[Weight]:
    w, split = tower.width, (tower.heads, tower.width // tower.heads)
    yield Weight(path + "probe", name + "probe", (w,), "query")
    parts = ("query", "key", "value")
    own, theirs = path + "attention/{}/", name + "attention.in_proj_"
    yield Weight(own + "kernel", theirs + "weight", (w, *split), "matrix", parts=parts)
    yield Weight(own + "bias", theirs + "bias", split, "bias", parts=parts)
    yield from norm(path + "norm", name + "layernorm", w)
    yield from projections(
        ("attention/out", "attention.out_proj", split, (w,)),
        ("mlp/fc1", "mlp.fc1", (w,), (tower.hidden_width,)),
        ("mlp/fc2", "mlp.fc2", (tower.hidden_width,), (w,)),
        path=path,
        name=name,
    )

"""The README.md of an exported model: what it is, how to use it, what to mind."""

from collections.abc import Collection

from mofi_jax.data import records
from mofi_jax.interop.folder import processor
from mofi_jax.model import mofi
from mofi_jax.model import text as text_lib

# The sentences of a model with both towers, and of one that has none for texts.
_BOTH = {
    "pipeline": "zero-shot-image-classification",
    "title": "Image and text embeddings",
    "what": """An image tower and a text tower with one shared embedding space, for picture
retrieval and for comparing pictures with text.""",
    "table": """| | image | text |
|---|---|---|
| layers x width / heads | {image} | {c.text.layers} x {c.text.width} / {c.text.heads} |
| parameters without projection | {image_parameters:,} | {text_parameters:,} |
| input | {pixels} | {c.context_length} tokens of {c.vocab_size:,} |""",
    "use": """model = transformers.CLIPModel.from_pretrained(FOLDER)
tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
processor = transformers.AutoImageProcessor.from_pretrained(FOLDER)

tokens = tokenizer(["a photo of a cat"], padding="max_length", truncation=True, return_tensors="pt")
pixels = processor(Image.open("cat.jpg"), return_tensors="pt")
with torch.no_grad():
    text = model.get_text_features(input_ids=tokens["input_ids"])
    image = model.get_image_features(**pixels)
# transformers 5 returns an object, transformers 4 the vectors; neither normalises.
text, image = (getattr(x, "pooler_output", x) for x in (text, image))
cosine = torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T""",
    "mind": """- Texts pool at {end}. Every row holds exactly one,
  the last token before the padding, also after truncation; the attention is causal, so no attention
  mask is needed.
- Cosines between pictures and between a picture and a text have different ranges: do not share a
  threshold between them.
""",
}
_IMAGE = {
    "pipeline": "image-feature-extraction",
    "title": "Image embeddings",
    "what": "An image tower, for picture retrieval.",
    "table": """| | image |
|---|---|
| layers x width / heads | {image} |
| parameters without projection | {image_parameters:,} |
| input | {pixels} |""",
    "use": """model = transformers.CLIPVisionModelWithProjection.from_pretrained(FOLDER)
processor = transformers.AutoImageProcessor.from_pretrained(FOLDER)

pixels = processor([Image.open("cat.jpg"), Image.open("dog.jpg")], return_tensors="pt")
with torch.no_grad():
    image = torch.nn.functional.normalize(model(**pixels).image_embeds)
cosine = image @ image.T""",
    "mind": "",
}

# What a model of the family siglip has otherwise.
_SIGLIP_NAMES = {
    "CLIPModel": "SiglipModel",
    "CLIPVisionModelWithProjection": "SiglipVisionModel",
    ".image_embeds": ".pooler_output",
}
_SIGLIP_MIND = """- Texts pool at their last position and read their padding: pad them all to the
  {c.context_length} tokens, with no attention mask. They are embedded with nothing but the file
  `tokenizer.json` done to them.
- `sigmoid(exp(logit_scale) * cosine + logit_bias)` of a picture and a text is the probability that
  they belong together.
"""

_CARD = """---
library_name: transformers
pipeline_tag: {pipeline}
tags:
- {c.family}
- mofi
- image-feature-extraction
---
# {title} trained with mofi_jax

{what} The recipe is that of [MOFI: Learning Image Representations from Noisy
Entity Annotated Images](https://arxiv.org/abs/2306.07952).

{table}

Embedding size {c.embed_dim}; activation {c.activation}; {entities}.

## Use
```python
import torch, transformers
from PIL import Image

{use}
```

## What to mind
{mind}- Pixels: the model was evaluated with `{preprocess}` (`preprocess.json`), then divided by 255
  and normalised with the mean and deviation in `preprocessor_config.json`, which {nearness}.
- `result.json` holds the largest difference between this folder as read back and the original.
"""

_SAME = "says the same"
_NEAREST = """is the nearest form
  that transformers can express: `pixels` in `result.json` says how far its pixels are off, of 255,
  and the cosines of embeddings with those of the right pixels"""

_ENTITIES = """`entities.parquet` and `entity_table.safetensors` hold one row for each of the
{count:,} entities the model was trained to name: the cosine of a picture's embedding with a row
says how well the entity fits"""


def text(
    config: mofi.MofiConfig,
    preprocess: str,
    entities: records.Entities | None,
    *,
    towers: Collection[str] = tuple(mofi.TOWERS),
) -> str:
    """The model card of one model; `entities` is the vocabulary of its class table, if any."""
    parts, siglip = _BOTH if "text" in towers else _IMAGE, config.family == "siglip"
    if siglip:
        use = parts["use"]
        for name, other in _SIGLIP_NAMES.items():
            use = use.replace(name, other)
        parts = parts | {"use": use, "mind": _SIGLIP_MIND if "text" in towers else ""}
    shape = config.image
    facts = {
        "c": config,
        "image": f"{shape.layers} x {shape.width} / {shape.heads}",
        "end": "their largest id"
        if config.eos_id == text_lib.LARGEST_ID
        else f"the first `eos_token` (id {config.eos_id})",
        "pixels": f"{config.image_size} x {config.image_size} pixels, patches of "
        f"{config.patch_size}",
        **{f"{name}_parameters": mofi.parameter_count(config, name) for name in towers},
    }
    filled = parts | {name: parts[name].format(**facts) for name in ("table", "mind")}
    return _CARD.format(
        **filled,
        c=config,
        entities="no entity table" if entities is None else _ENTITIES.format(count=len(entities)),
        preprocess=preprocess,
        nearness=_SAME
        if processor.expresses(preprocess, config.image_size, config.family)
        else _NEAREST,
    )

"""The README.md of an exported model: what it is, how to use it, what to mind."""

from mofi_jax.data import records
from mofi_jax.model import mofi

_CARD = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags:
- clip
- mofi
- image-feature-extraction
---
# Image and text embeddings trained with mofi_jax

An image tower and a text tower with one shared embedding space, for picture retrieval and for
comparing pictures with text. The recipe is that of [MOFI: Learning Image Representations from Noisy
Entity Annotated Images](https://arxiv.org/abs/2306.07952).

| | image | text |
|---|---|---|
| layers x width / heads | {c.image.layers} x {c.image.width} / {c.image.heads} | \
{c.text.layers} x {c.text.width} / {c.text.heads} |
| parameters without projection | {image:,} | {text:,} |
| input | {c.image_size} x {c.image_size} pixels, patches of {c.patch_size} | \
{c.context_length} tokens of {c.vocab_size:,} |

Embedding size {c.embed_dim}; activation {c.activation}; {entities}.

## Use
```python
import torch, transformers
from PIL import Image

model = transformers.CLIPModel.from_pretrained(FOLDER)
tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
processor = transformers.AutoImageProcessor.from_pretrained(FOLDER)

tokens = tokenizer(["a photo of a cat"], padding="max_length", truncation=True, return_tensors="pt")
pixels = processor(Image.open("cat.jpg"), return_tensors="pt")
with torch.no_grad():
    text = model.get_text_features(input_ids=tokens["input_ids"])
    image = model.get_image_features(**pixels)
# transformers 5 returns an object, transformers 4 the vectors; neither normalises.
text, image = (getattr(x, "pooler_output", x) for x in (text, image))
cosine = torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
```

## What to mind
- Texts pool at the first `eos_token` (id {eos}). Every row holds exactly one, the last token before
  the padding, also after truncation; the attention is causal, so no attention mask is needed.
- Pixels: the model was evaluated with `{preprocess}` (`preprocess.json`), then divided by 255 and
  normalised with CLIP's mean and deviation. `preprocessor_config.json` is the nearest form that
  transformers can express; its resampling differs slightly.
- Cosines between pictures and between a picture and a text have different ranges: do not share a
  threshold between them.
- `result.json` holds the largest difference between this folder as read back and the original.
"""

_ENTITIES = """`entities.parquet` and `entity_table.safetensors` hold one row for each of the
{count:,} entities the model was trained to name: the cosine of a picture's embedding with a row
says how well the entity fits"""


def text(config: mofi.MofiConfig, preprocess: str, entities: records.Entities | None) -> str:
    """The model card of one model; `entities` is the vocabulary of its class table, if any."""
    image, text = (mofi.parameter_count(config, tower) for tower in ("image", "text"))
    return _CARD.format(
        c=config,
        eos=config.eos_id,
        image=image,
        text=text,
        entities="no entity table" if entities is None else _ENTITIES.format(count=len(entities)),
        preprocess=preprocess,
    )

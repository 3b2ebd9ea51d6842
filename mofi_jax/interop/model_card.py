"""The README.md of an exported model: what it is, how to use it, what to mind."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mofi_jax.common.errors import BadInput
from mofi_jax.data import records
from mofi_jax.interop.folder import processor
from mofi_jax.model import mofi
from mofi_jax.model import text as text_lib

_HUB_NAME = r"[\w.-]+/[\w.-]+"

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

# What opens a model in another library: the imports and the lines of "use".
_OPEN_CLIP = {
    "library": "open_clip",
    "imports": "import open_clip, timm, torch",
    "use": """model, processor = open_clip.create_model_from_pretrained("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")

with torch.no_grad():
    text = model.encode_text(tokenizer(["a photo of a cat"]), normalize=True)
    image = model.encode_image(processor(Image.open("cat.jpg"))[None], normalize=True)
cosine = image @ text.T

# The image tower alone, in timm:
tower = timm.create_model("local-dir:FOLDER", pretrained=True)""",
    "mind": """- open_clip cleans texts before it reads them (HTML, Unicode, spaces), as in training
  nothing did: `tokens` in `result.json` counts the probes that this changes.
- On the hub, `hf_tokenizer_name` in `open_clip_config.json` has to be the name of the repository.
- Cosines between pictures and between a picture and a text have different ranges: do not share a
  threshold between them.
""",
}

_CARD = """---
library_name: {library}
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
{imports}
from PIL import Image

{use}
```

## What to mind
{mind}- Pixels: the model was evaluated with `{preprocess}` (`preprocess.json`), then divided by 255
  and normalised with the mean and deviation in `{file}`, which {nearness}.
- `result.json` holds the largest difference between this folder as read back and the original.
"""

_SAME = "says the same"
_NEAREST = """is the nearest form
  that it can express: `pixels` in `result.json` says how far its pixels are off, of 255,
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
    library: str = "transformers",
) -> str:
    """The model card of one model; `entities` is the vocabulary of its class table, if any.

    Args:
      library: whose folder it is, transformers or open_clip.
    """
    parts, siglip = _BOTH if "text" in towers else _IMAGE, config.family == "siglip"
    parts = {"library": library, "imports": "import torch, transformers"} | parts
    if library == "open_clip":
        parts = parts | _OPEN_CLIP
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
        file="preprocessor_config.json" if library == "transformers" else "open_clip_config.json",
        nearness=_SAME
        if library == "transformers"
        and processor.expresses(preprocess, config.image_size, config.family)
        else _NEAREST,
    )


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a model's folder does not say of it; each may be empty."""

    license: str = ""  # by the hub's short names, as apache-2.0
    data_card: str = ""  # OWNER/NAME of a data set on the hub, or an address
    scores: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # a model of `evaluate`

    def __post_init__(self):
        """Raises BadInput for a license or a data card that a card cannot hold."""
        if not re.fullmatch(r"[a-z0-9.+-]*", self.license):
            raise BadInput(
                f"--license={self.license} is none of the hub's short names: write it as in "
                "apache-2.0, or other."
            )
        if not re.fullmatch(rf"({_HUB_NAME}|https?://[^\s()<>]+)?", self.data_card):
            raise BadInput(
                f"--data_card={self.data_card} is neither OWNER/NAME of a data set on the hub nor "
                "an address that begins with https://: give one of them."
            )


def complete(card: str, origin: Origin, report: Mapping[str, Any]) -> str:
    """A card with license, data card and scores, and what the parity report found.

    Args:
      report: as of `parity.report`.
    """
    head, sections, link = "", [], origin.data_card
    if origin.license:
        head += f"license: {origin.license}\n"
    if link:
        if re.fullmatch(_HUB_NAME, link):
            head += f"datasets:\n- {link}\n"
            link = f"https://huggingface.co/datasets/{link}"
        sections.append(f"## Data\nThe [data card]({link}) says what the training data are.\n")
    if rows := list(_scores(origin.scores)):
        sections.append(_table("Scores", ("set", "metric", "value", "95 %", "protocol"), rows))
    columns = ("reader", "image", "text", "texts with other tokens", "pixels of 255", "cosine")
    rows = [_read(name, report) for name in report["differences"]]
    rows += [(name, f"not run: {why}", *[""] * 4) for name, why in report["not_run"].items()]
    read = _table("Read back", columns, rows)
    sections.append(
        f"{read}\nLargest differences between this folder, as each library read it, and the model "
        "itself: of L2-normalised embeddings of the same pixels and ids; of pixels of pictures of "
        "odd sizes, and the lowest cosine that this leaves between their embeddings.\n"
    )
    return "\n".join([card.replace("---\n", f"---\n{head}", 1), *sections])


def _scores(model: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for evaluator, metrics in sorted(model.get("metrics", {}).items()):
        protocol = model.get("protocols", {}).get(evaluator, {}).get("protocol", "")
        intervals = model.get("intervals", {}).get(evaluator, {})
        for metric, value in sorted(metrics.items()):
            low, high = intervals.get(metric, (None, None))
            interval = "" if low is None else f"{low:.4f} to {high:.4f}"
            yield evaluator, metric, f"{value:.4f}", interval, protocol


def _read(name: str, report: Mapping[str, Any]) -> tuple[str, ...]:
    differences, pixels = report["differences"][name], report["pixels"].get(name)
    tokens = report["tokens"].get(name)
    return (
        name,
        *(f"{differences[k]['max']:.1e}" if k in differences else "" for k in ("image", "text")),
        f"{tokens['differing']} of {tokens['texts']}" if tokens else "",
        str(pixels["max"]) if pixels else "",
        f"{pixels['min_cosine']:.4f}" if pixels else "",
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # Reasons and names of sets may hold anything.
    cells = [[" ".join(str(cell).replace("|", "/").split()) for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return f"## {title}\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)

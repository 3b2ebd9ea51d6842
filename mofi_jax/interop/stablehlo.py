"""Towers as StableHLO programs with their weights inside, by `jax.export`.

A folder holds a file for each tower, which runs on CPUs, NVIDIA GPUs and TPUs in batches of any
size and needs jax alone, and beside them the tokenizer, the preprocessing and the entities.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export
from jax.extend import core

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops, records
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.interop import huggingface, parity
from mofi_jax.interop.folder import processor
from mofi_jax.model import mofi

PROGRAMS = "stablehlo.json"  # what the files are, and who wrote them
PLATFORMS = ("cpu", "cuda", "tpu")

# The file format counts bytes in 31 bits; some are left for the program itself.
LARGEST = 2**31 - 2**25

_CARD = """---
library_name: jax
tags:
- stablehlo
- mofi
- image-feature-extraction
---
# Embeddings trained with mofi_jax, as StableHLO

```python
import jax, jax.export, numpy as np

embed = jax.jit(jax.export.deserialize(bytearray(open("image.stablehlo", "rb").read())).call)
embed(np.zeros((3, {c.image_size}, {c.image_size}, 3), np.uint8))  # float32 [3, {c.embed_dim}]
```

`image.stablehlo` takes RGB pictures, uint8 [b, {c.image_size}, {c.image_size}, 3], prepared as
`preprocess.json` says. {text}What comes out is float32 [b, {c.embed_dim}] of length 1.
Programs run on {platforms} in float32 with products of the highest precision, weights inside,
written with jax
{jax}; programs open with later releases of jax for at least six months. `result.json` holds the
largest difference from the model itself.
"""

_TEXT = """`text.stablehlo` takes the ids of `tokenizer.json`, int32 [b, {t}], each text
ending with the token {eos}, then padding. """


def embedder(config: mofi.MofiConfig, params: mofi.Params, tower: str) -> Callable[..., jax.Array]:
    """A tower's function of its inputs alone, which runs on every platform, in float32.

    Of pictures uint8 [b, s, s, 3] (floats are normalised already) or ids int32 [b, t].
    """
    everywhere = {"dtype": "float32", "attention": "xla", "remat": "none"}
    config = dataclasses.replace(config, **everywhere)
    embed = {"image": mofi.embed_images, "text": mofi.embed_texts}[tower]
    weights = {tower: jax.tree.map(jnp.asarray, params[tower])}
    return lambda inputs: embed(config, weights, inputs)


def text_shape(config: mofi.MofiConfig) -> tuple[Any, Any]:
    """Symbolic shape of ids: any number of texts, and up to `context_length` tokens of each.

    SigLIP pools at the last position, where the padding ends, so that all are needed.
    """
    if config.family == "siglip":
        return (*export.symbolic_shape("batch_size"), config.context_length)
    limit = f"sequence_length <= {config.context_length}"
    return export.symbolic_shape("batch_size, sequence_length", constraints=[limit])


def write(folder: epath.PathLike, clip: huggingface.Clip) -> None:
    """Writes image.stablehlo, text.stablehlo unless the model has no such tower, and the rest.

    Raises BadInput: a tower above 2 GiB, or a text tower without tokenizer.
    """
    folder, config = epath.Path(folder), clip.config
    towers = [name for name in mofi.TOWERS if name in clip.params]
    for name in towers:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(clip.params[name]))
        if size > LARGEST:
            raise BadInput(
                f"The {name} tower has {size / 2**30:.1f} GiB, and a StableHLO file with its "
                "weights ends at 2: export this model with --format=hf."
            )
    if "text" in towers and clip.tokenizer is None:
        raise BadInput(
            "The model has no tokenizer, without which its text tower is of no use: put its "
            f"{records.TOKENIZER_FILE} into the folder of the model."
        )
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = ops.expand(clip.preprocess, config.image_size)
    files.write_json(folder / processor.PREPROCESS, {"preprocess": preprocess})
    if "text" in towers:
        huggingface.write_tokenizer(folder, clip.tokenizer, config.family)
    huggingface.write_entities(folder, clip)
    side = config.image_size
    inputs = {
        "image": (jnp.uint8, (*export.symbolic_shape("batch_size"), side, side, 3)),
        "text": (jnp.int32, text_shape(config)),
    }
    programs = {}
    for name in towers:
        dtype, shape = inputs[name]
        spec = jax.ShapeDtypeStruct(shape, dtype)
        with jax.default_matmul_precision("highest"):
            program = jax.jit(_frozen(embedder(config, clip.params, name), spec))
            program = export.export(program, platforms=PLATFORMS)(spec)
        (folder / f"{name}.stablehlo").write_bytes(program.serialize())
        programs[name] = {
            "file": f"{name}.stablehlo",
            "input": f"{spec.dtype}[{', '.join(map(str, shape))}]",
            "output": f"float32[batch_size, {config.embed_dim}]",
            "calling_convention_version": program.calling_convention_version,
        }
    values = {"jax": jax.__version__, "platforms": PLATFORMS, "programs": programs}
    files.write_json(folder / PROGRAMS, values | {"model": config.to_dict()})
    t = "t" if config.family == "clip" else config.context_length
    card = _CARD.format(
        c=config,
        jax=jax.__version__,
        platforms=", ".join(PLATFORMS),
        text=_TEXT.format(t=t, eos=clip.tokenizer.eos_id) if "text" in towers else "",
    )
    (folder / "README.md").write_text(card)


def readers(folder: epath.PathLike) -> dict[str, parity.Reader]:
    """Who opens the folder."""
    return {"jax.export": functools.partial(_read, epath.Path(folder))}


def _read(
    folder: epath.Path, pictures: np.ndarray, texts: tuple[str, ...]
) -> dict[str, np.ndarray]:
    values = files.read_json_object(folder / PROGRAMS, "export the model again")
    config = mofi.MofiConfig.from_dict(values["model"])
    inputs = {"image": pictures}
    if "text" in values["programs"]:
        path = folder / records.TOKENIZER_FILE
        inputs["text"] = tokenizer_lib.Tokenizer(path, config.context_length)(list(texts))
    found = {"tokens": inputs["text"]} if "text" in inputs else {}
    for name, batch in inputs.items():
        program = bytearray((folder / values["programs"][name]["file"]).read_bytes())
        call = jax.jit(export.deserialize(program).call)
        found[name] = np.concatenate([np.asarray(call(part)) for part in odd_batches(batch)])
    return found


def odd_batches(rows: np.ndarray) -> Sequence[np.ndarray]:
    """Batches of one, two, and the others: a program is for any of them."""
    return [part for part in (rows[:1], rows[1:3], rows[3:]) if len(part)]


def _frozen(
    embed: Callable[..., jax.Array], inputs: jax.ShapeDtypeStruct
) -> Callable[[Any], jax.Array]:
    """The same function, with all that does not depend on its input computed here and now.

    What a model makes of its weights (norms folded into them, masks) would stay in the file beside
    them, for each start of the program to compute again: XLA took 42 s to compile B/16's on two
    cores and takes 13 so.
    """
    closed = jax.make_jaxpr(embed)(inputs)
    jaxpr = closed.jaxpr
    known = dict.fromkeys(jaxpr.constvars)
    before, after = [], []
    for eqn in jaxpr.eqns:
        of_weights = all(isinstance(var, core.Literal) or var in known for var in eqn.invars)
        # Constants broadcast to a symbolic shape depend on the input too.
        sizes = [size for var in eqn.outvars for size in var.aval.shape]
        if of_weights and all(isinstance(size, int) for size in sizes):
            before.append(eqn)
            known |= dict.fromkeys(eqn.outvars)
        else:
            after.append(eqn)
    used = {var for eqn in after for var in eqn.invars if not isinstance(var, core.Literal)}
    needed = [var for var in known if var in used]
    names = jaxpr.debug_info._replace(arg_names=(), result_paths=None)
    first = jaxpr.replace(invars=[], outvars=needed, eqns=before, debug_info=names)
    rest = jaxpr.replace(constvars=needed, eqns=after)
    values = core.jaxpr_as_fun(core.ClosedJaxpr(first, closed.consts))()
    run = core.jaxpr_as_fun(core.ClosedJaxpr(rest, values))
    return lambda inputs: run(inputs)[0]

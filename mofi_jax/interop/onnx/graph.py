"""Towers as ONNX graphs by jax2onnx, and onnxruntime to run them: a process of its own.

    PYTHONPATH=.venv/onnx_exporter python -m mofi_jax.interop.onnx.graph write FOLDER
    PYTHONPATH=.venv/onnx_exporter python -m mofi_jax.interop.onnx.graph run FOLDER IN.npz OUT.npz

The first reads the model of a Hugging Face folder and writes its graphs beside it, the second runs
graphs of a folder on the arrays of their names.
"""

import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export

from mofi_jax.interop import huggingface, stablehlo
from mofi_jax.model import mofi

OPSET = (
    18  # the newest that all of exact GELU, its approximations and older browsers have in common
)

# Tower to graph, by the names of transformers.js, and to its input. The graphs lie in onnx/.
GRAPHS = {"image": "vision_model.onnx", "text": "text_model.onnx"}
INPUTS = {"image": "pixel_values", "text": "input_ids"}


def output(tower: str, family: str) -> str:
    """The name under which transformers.js looks for embeddings."""
    return "pooler_output" if family == "siglip" else f"{tower}_embeds"


def write(folder: epath.Path) -> None:
    """Writes a graph for each tower of the Hugging Face folder."""
    clip = huggingface.read(folder)
    config = clip.config
    side = config.image_size
    batch = export.symbolic_shape("batch_size")
    inputs = {
        "image": jax.ShapeDtypeStruct((*batch, 3, side, side), jnp.float32),
        "text": jax.ShapeDtypeStruct(stablehlo.text_shape(config), jnp.int32),
    }
    (folder / "onnx").mkdir()
    for tower in (name for name in mofi.TOWERS if name in clip.params):
        embed = stablehlo.embedder(config, clip.params, tower)
        # jax2onnx takes jax.random apart while it traces, which making a tower needs once.
        jax.eval_shape(embed, jax.ShapeDtypeStruct(*_native(config, tower)))
        _write_graph(
            folder / "onnx" / GRAPHS[tower],
            _from_nchw(embed) if tower == "image" else embed,
            inputs[tower],
            names=(INPUTS[tower], output(tower, config.family)),
        )


def _native(config: mofi.MofiConfig, tower: str) -> tuple[tuple[int, ...], Any]:
    if tower == "image":
        return (1, config.image_size, config.image_size, 3), jnp.float32
    return (1, config.context_length), jnp.int32


def _from_nchw(embed: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda pixels: embed(pixels.transpose(0, 2, 3, 1))


def _write_graph(
    path: epath.Path,
    embed: Callable[..., jax.Array],
    inputs: jax.ShapeDtypeStruct,
    *,
    names: tuple[str, str],
) -> None:
    """One file with the weights inside, of a function of one argument."""
    import jax2onnx
    import onnx
    import onnxruntime

    def unrolled(inputs: jax.Array) -> jax.Array:
        # Without loops over layers, which browsers' GPUs would leave to the CPU.
        with jax.disable_jit():
            return embed(inputs)

    jax2onnx.to_onnx(
        unrolled,
        [inputs],
        model_name=path.stem,
        opset=OPSET,
        return_mode="file",
        export_mode="web",
        output_path=str(path),
        input_names=names[:1],
        output_names=names[1:],
    )
    # What a model makes of its weights is a constant, and needed in place of them.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    model = onnx.load(str(path))
    if inputs.dtype == jnp.int32:
        _take_int64(model)
    used = {node.domain for node in model.graph.node}
    opsets = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    model.producer_name = "mofi_jax"
    values = {name: importlib.metadata.version(name) for name in ("jax", "jax2onnx")}
    onnx.helper.set_model_props(model, values)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _take_int64(model: Any) -> None:
    """Ids as transformers.js gives them; jax has none of 64 bits unless all of it has."""
    import onnx

    value = model.graph.input[0]
    for node in model.graph.node:
        node.input[:] = ["ids" if name == value.name else name for name in node.input]
    cast = onnx.helper.make_node("Cast", [value.name], ["ids"], to=onnx.TensorProto.INT32)
    model.graph.node.insert(0, cast)
    value.type.tensor_type.elem_type = onnx.TensorProto.INT64


def run(folder: epath.Path, source: epath.Path, target: epath.Path) -> None:
    """Embeds arrays named as `GRAPHS`' towers, some at a time (`stablehlo.odd_batches`)."""
    import onnxruntime

    found = {}
    for tower, rows in np.load(source).items():
        path = str(folder / "onnx" / GRAPHS[tower])
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        batches = stablehlo.odd_batches(rows)
        found[tower] = np.concatenate(
            [session.run(None, {INPUTS[tower]: batch})[0] for batch in batches]
        )
    np.savez(target, **found)


def main(command: str, *paths: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    {"write": write, "run": run}[command](*map(epath.Path, paths))


if __name__ == "__main__":
    main(*sys.argv[1:])

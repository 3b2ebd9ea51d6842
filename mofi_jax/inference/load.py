"""Opens what a model was saved as: a training run, a Hugging Face CLIP folder, or open_clip's."""

import os
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import records
from mofi_jax.data import tokenizer as tokenizer_lib
from mofi_jax.distributed import hosts, meshes, sharding
from mofi_jax.inference.model import Model
from mofi_jax.inference.towers import Towers
from mofi_jax.interop import from_hub, huggingface, open_clip
from mofi_jax.interop.folder import weights
from mofi_jax.losses import class_order
from mofi_jax.model import mofi
from mofi_jax.training import arrays, checkpoint, run_folder


def load(
    path: epath.PathLike, *, step: str = "", mesh: Mesh | None = None, batch_size: int = 256
) -> Model:
    """Opens a training run folder (model.json), a Hugging Face CLIP folder or one of open_clip.

    ``hf:OWNER/NAME`` is fetched from the hub (`interop.from_hub`).

    Args:
      step: of a run: a saved step, "best" (config.checkpoint.keep_best), or "" for the last.
      mesh: the devices to use; all of this process without one.
      batch_size: pictures or texts on all devices at a time.

    Raises BadInput: a folder that is neither, or one that is damaged.
    """
    name = os.fspath(path)
    path = hosts.all_or_none(lambda: from_hub.model(name))
    saved = read(path, step)
    towers = Towers(
        *(saved.config, saved.tokenizer, saved.entities, saved.preprocess),
        mesh=meshes.make_mesh(devices=jax.local_devices()) if mesh is None else mesh,
        batch_size=batch_size,
    )
    of_step = f", step {step}" if step and kind(path) == "run" else ""
    if path != name:  # of the hub
        of_step = f", revision {from_hub.revisions()[name]}"
    return Model(towers, towers.put(saved.params), f"{name}{of_step}")


def read(path: epath.PathLike, step: str = "", *, by_rows: bool = False) -> huggingface.Clip:
    """As `load`, whole in host memory; a run may lack a tower, which a CLIP folder never does.

    With `by_rows` a run's class table stays on disk too, if not in a bucket, and is of use to
    `huggingface.write_entities` alone.
    """
    path = files.input_folder(hosts.all_or_none(lambda: from_hub.model(path)), "--model")
    found = kind(path)
    if found == "run":
        saved = _read_run(path, hosts.agree(lambda: run_folder.read_model(path)), step, by_rows)
    else:
        folder = {"clip": huggingface, "open_clip": open_clip}[found]
        saved = hosts.all_or_none(lambda: folder.read(path))
    whole = {k: v for k, v in saved.params.items() if not isinstance(v, weights.Scattered)}
    arrays.check_finite(whole, path)
    return saved


def kind(path: epath.PathLike) -> str:
    """What a folder is: "run", "clip" or "open_clip"; BadInput for a folder that is none."""
    path = epath.Path(hosts.all_or_none(lambda: from_hub.model(path)))

    # It decides what hosts ask one another next: host 0 looks for all.
    def find() -> str:
        if (path / run_folder.MODEL_FILE).exists():
            return "run"
        if open_clip.is_folder(files.local_input(path, "the model")):
            return "open_clip"
        if (path / "config.json").exists():
            return "clip"
        raise BadInput(
            f"{path} is neither a training run ({run_folder.MODEL_FILE}) nor a Hugging Face CLIP "
            "folder (config.json) nor open_clip's (open_clip_config.json): give the folder of one "
            "of them, or of a model on the hub its name, hf:OWNER/NAME."
        )

    return hosts.agree(find)


def _read_run(
    path: epath.Path, values: dict[str, Any], step: str, by_rows: bool
) -> huggingface.Clip:
    config = run_folder.model_config(values)
    apart = (sharding.ENTITY_TABLE,) if by_rows and not files.is_remote(path) else ()
    params = checkpoint.restore_params(path, step, by_rows=apart)
    towers = tuple(name for name in mofi.TOWERS if name in params)
    wanted = jax.eval_shape(lambda key: mofi.create(config, key, towers=towers), jax.random.key(0))
    wrong = arrays.differences(
        *({name: tree[name] for name in towers} for tree in (params, wanted))
    )
    if wrong:
        name, how = next(iter(wrong.items()))
        raise BadInput(
            f"{path / run_folder.MODEL_FILE} does not describe the run's checkpoint ({name} {how}, "
            f"one of {len(wrong)} arrays): put back the one that was written with it."
        )
    tokenizer = entities = None
    if "text" in params and (path / records.TOKENIZER_FILE).exists():
        tokenizer = tokenizer_lib.Tokenizer(path / records.TOKENIZER_FILE, config.context_length)
    if sharding.ENTITY_TABLE in params:
        if values.get("table_order") != class_order.TABLE_ORDER:
            raise BadInput(
                f"{path} was trained by another version, whose class table has its rows in another "
                "order: use that version, or train again."
            )
        entities = records.read_entities(path / records.ENTITIES_FILE)
        if apart:
            rows = params[sharding.ENTITY_TABLE]
            shape = (len(entities), config.embed_dim)
            params[sharding.ENTITY_TABLE] = huggingface.by_entity(rows, shape)
    return huggingface.Clip(config, params, tokenizer, entities, values["preprocess"])

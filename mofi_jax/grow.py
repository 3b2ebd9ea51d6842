"""Carries a training run over to a larger vocabulary, where it goes on.

    mofi grow --model RUN --data NEW_DATA --workdir GROWN
    mofi grow --model RUN --data NEW_DATA --workdir GROWN --missing drop
    mofi train --config finetune:recipe=entities,model=GROWN,data=NEW_DATA,total="99 epochs" \\
        --workdir GROWN

Entities are matched by QID: those that RUN knows keep their row of the class table and its moments
to the bit, whatever their new ids; new ones start at the embedding of their name and description by
RUN's own text tower, or at random where it has none.  Everything else of the last checkpoint, the
step included, is taken over; the data begin from their first example.  Run again, it does nothing.

It runs on one host, because a table moves as one array; on a host of a larger TPU slice set
JAX_PLATFORMS=cpu, as the slice's chips would wait for its other hosts.
"""

from typing import Any

import ml_collections
import numpy as np
from absl import logging
from etils import epath

from mofi_jax import inference
from mofi_jax.common import cli, files
from mofi_jax.common.errors import BadInput
from mofi_jax.data import records, tokenizer, training_set
from mofi_jax.distributed import meshes, sharding
from mofi_jax.losses import class_order
from mofi_jax.training import checkpoint, class_table, run_folder, settings, setup, state

NAMED = 5  # QIDs that an error names


def main(model: str, data: str, workdir: str, name: str = "", missing: str = "refuse") -> None:
    """Writes the grown run.

    Args:
      model: folder of a training run with a class table.
      data: folder of the new data set, which holds NAME/VERSION/.
      workdir: the new run's folder.
      name: of the data set; that of `model`'s own data if left out.
      missing: what becomes of entities of `model` that the new data set lacks: "refuse" or "drop".

    Raises:
      BadInput: a run without checkpoint or class table, another tokenizer, entities that would be
        lost, a workdir that holds another run.
    """
    if missing not in ("refuse", "drop"):
        raise BadInput(f"--missing={missing}: choose refuse or drop.")
    run, out = files.input_folder(model, "--model"), files.replaced_folder(workdir, "--workdir")
    if (out / "result_grow.json").exists():
        logging.info("%s has already been grown", out)
        return
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty: name a new folder for the grown run.")

    # ---------------------------------------------------------------------- the run and its data
    config = read_config(run)
    if run_folder.read_model(run).get("table_order") != class_order.TABLE_ORDER:
        raise BadInput(f"{run} was trained by another version: its class table has another order.")
    config.data.dir, config.data.name = data, name or config.data.name
    opened = training_set.open_training_set(config)
    own = tokenizer.Tokenizer(run / records.TOKENIZER_FILE, config.model.context_length)
    if own.fingerprint != opened.texts.fingerprint:
        raise BadInput(
            f"{opened.texts.path} is not the tokenizer of {run}: copy {own.path} over it; records "
            "hold texts, not tokens."
        )
    old, new = records.read_entities(run / records.ENTITIES_FILE), opened.entities
    lost = sorted(set(old.qids) - set(new.qids))
    if lost and missing == "refuse":
        some = ", ".join(lost[:NAMED]) + (", ..." if len(lost) > NAMED else "")
        raise BadInput(
            f"{len(lost)} of {len(old)} entities of {run} are not in the new data ({some}): keep "
            "them in its vocabulary, or pass --missing=drop to lose their rows."
        )
    mesh = meshes.make_mesh()
    step = checkpoint.last_step(run)
    train_setup = setup.make(config, mesh, **opened.sizes | {"num_entities": len(old)})
    if step >= train_setup.clock.total_steps:
        logging.warning(
            "%s is at step %d of config.total=%r: raise the total to train on",
            *(run, step, config.total),
        )
    structs, _ = state.abstract(train_setup.init, mesh)
    old_state = checkpoint.restore(run, step, structs)

    # ---------------------------------------------------------------------- the grown state
    sources = class_table.match(old.qids, new.qids)  # old ids by new ones, -1 for new entities
    added = np.flatnonzero(sources < 0)
    model_config, preprocess = train_setup.context.model, config.data.eval_ops
    towers = inference.Towers(model_config, opened.texts, new, preprocess, mesh)
    rows = new_rows(towers, old_state.params, added, len(old))
    grown = class_table.moved_rows(
        old_state,
        sources=class_table.rows_of_sources(sources, len(old)),
        # Rows of the table lie in another order than ids.
        new_rows=rows[np.argsort(class_order.table_rows(added, len(new)))],
        table_rows=class_order.padded_rows(len(new), mesh),
    )

    # ---------------------------------------------------------------------- the new folder
    # Under another name until it is complete: train would begin anew in one without checkpoint.
    part = out.parent / f"{out.name}.partial"
    if part.exists():
        part.rmtree()
    part.mkdir(parents=True)
    for file in (run_folder.MODEL_FILE, "config.json", records.TOKENIZER_FILE):
        files.write_text(part / file, (run / file).read_text())
    opened.entities_path.copy(part / records.ENTITIES_FILE, overwrite=True)
    fingerprint = run_folder.data_fingerprint(config, opened.parts, opened.texts)
    seconds = checkpoint.read_position(run, step).seconds
    position = checkpoint.Position(0, fingerprint, seconds, run_folder.as_json(config))
    writer = checkpoint.Checkpointer(part, keep=1)
    writer.save(step, sharding.put(mesh, grown), position)
    writer.close()
    counts = {
        "step": step,
        "entities": len(new),
        "kept": len(new) - len(added),
        "added": len(added),
        "dropped": len(lost),
        "new_rows": "text tower" if "text" in old_state.params else "random",
    }
    files.write_json(part / "result_grow.json", counts)
    if out.exists():
        out.rmdir()  # it is empty
    part.rename(out)
    logging.info("grown: %s", counts)


def read_config(run: epath.Path) -> ml_collections.ConfigDict:
    """The config that `run` was trained with."""
    path = run / "config.json"
    if not path.exists():
        raise BadInput(f"{run} is no training run (no config.json): name the --workdir of one.")
    remedy = "put back the config.json that the training wrote"
    config = ml_collections.ConfigDict(files.read_json_object(path, remedy))
    try:
        if "block" not in config.data:  # written by an earlier version
            config.data.block = 1
        if "stages" not in config:
            config.stages = ()
        settings.validate(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is no training config ({error}): {remedy}.") from error
    if "entity" not in config.losses:
        raise BadInput(
            f"{run} was trained without the entity loss, so it has no vocabulary to grow: train "
            "with task=supervised or task=multitask."
        )
    return config


def new_rows(towers: inference.Towers, params: Any, ids: np.ndarray, num_old: int) -> np.ndarray:
    """float32 [len(ids), d]: the first rows of new entities, as long as a typical old one.

    The loss normalises rows, so a row's length decides only how fast it turns.  `towers` have the
    new vocabulary, `params` the class table of the old one.
    """
    old = np.asarray(params[sharding.ENTITY_TABLE])[:num_old]
    if "text" in params and len(ids):
        texts = [towers.entities.text(int(i), with_description=True) for i in ids]
        directions = towers.embed_texts(params, texts)
    else:
        rng = np.random.default_rng(len(towers.entities))
        directions = rng.normal(size=(len(ids), old.shape[1])).astype(np.float32)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return (np.median(np.linalg.norm(old, axis=1)) * directions).astype(np.float32)


if __name__ == "__main__":
    cli.run(main)

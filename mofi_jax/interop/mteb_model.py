"""Our models in mteb, other people's benchmark of embeddings (``pip install mofi_jax[mteb]``).

    import mteb
    model = mteb_model.MtebModel(inference.load(FOLDER, mesh=meshes.make_mesh()), "me/model")
    mteb.evaluate(model, mteb.get_tasks(tasks=["CIFAR100ZeroShot", "SOPI2IRetrieval"]))

It is mteb's EncoderProtocol (mteb 2, mteb/models/models_protocols.py) in NumPy, without torch.
Scores of mteb's tasks go by mteb's own protocols.  Its ROxford and RParis tasks are headed by mAP
of the first 5 and its Met task by the hit rate at 1, other metrics than the trapezoid mAP and GAP
of the literature, which `mofi_jax.evaluate` gives: never put both in one table.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from mofi_jax.model import mofi


class MtebModel:
    """A model as mteb asks it: batches of pictures, texts or both in, one vector each out.

    Args:
      model: what `mofi_jax.inference.load` returns.
      name: ORGANISATION/MODEL, under which mteb files the results.
      revision: of the model, likewise.
    """

    def __init__(self, model: Any, name: str, revision: str = "local"):
        self._model, self._name, self._revision = model, name, revision

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[Any]]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Float[np.ndarray, "n d"]:
        """L2-normalised float32 embeddings; of a picture with its text that of their sum.

        Nothing depends on the task: texts get no prompt of their own.

        Args:
          inputs: batches with ``image`` (PIL), ``text`` or both; their size does not matter.

        Raises BadInput: texts for a model without text tower.
        """
        del task_metadata, hf_split, hf_subset, prompt_type, kwargs
        texts: list[str] = []

        def pictures() -> Iterator[Image.Image]:
            for batch in inputs:
                texts.extend(batch.get("text", ()))
                yield from batch.get("image", ())

        towers, params = self._model.towers, self._model.params
        parts = [*towers.embed_image_batches(params, self._chunks(pictures()))]
        embedded = [np.concatenate(parts)] if parts else []
        if texts:
            embedded.append(self._model.embed_texts(texts))
        if not embedded:
            return np.zeros((0, towers.config.embed_dim), np.float32)
        total = np.sum(embedded, axis=0, dtype=np.float32)
        return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)

    def _chunks(self, pictures: Iterator[Image.Image]) -> Iterator[UInt8[np.ndarray, "_ s s 3"]]:
        """Pixels as the model takes them, in batches of its own size."""
        towers, pixels = self._model.towers, []
        for picture in pictures:
            file = io.BytesIO()
            # Through a file without loss, so that all that may be odd about a picture is handled
            # where pictures are read.
            picture.save(file, "PNG", compress_level=0)
            pixels.append(towers.decode(file.getvalue()))
            if len(pixels) == towers.batch_size:
                yield np.stack(pixels)
                pixels = []
        if pixels:
            yield np.stack(pixels)

    def similarity(
        self, embeddings1: Float[np.ndarray, "n d"], embeddings2: Float[np.ndarray, "m d"]
    ) -> Float[np.ndarray, "n m"]:
        """Cosines of what `encode` gives."""
        return np.asarray(embeddings1) @ np.asarray(embeddings2).T

    def similarity_pairwise(
        self, embeddings1: Float[np.ndarray, "n d"], embeddings2: Float[np.ndarray, "n d"]
    ) -> Float[np.ndarray, " n"]:
        """Cosines of the rows with one another."""
        return (np.asarray(embeddings1) * np.asarray(embeddings2)).sum(1)

    @property
    def mteb_model_meta(self) -> Any:
        """mteb's description of the model."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        towers = self._model.towers
        # The class table takes no part in an embedding.
        both = {name: self._model.params.get(name, {}) for name in mofi.TOWERS}
        parameters = sum(leaf.size for leaf in jax.tree.leaves(both))
        known = {
            "name": self._name,
            "revision": self._revision,
            "n_parameters": parameters,
            "embed_dim": towers.config.embed_dim,
            "framework": ["JAX"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": False,
            "modalities": ["image"] if towers.tokenizer is None else ["image", "text"],
        }
        return ModelMeta.create_empty(known)

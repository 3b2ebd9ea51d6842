"""Our models in mteb, other people's benchmark of embeddings (``pip install mofi_jax[mteb]``).

    import mteb
    model = mteb_model.MtebModel(mofi_jax.load(FOLDER), "me/model")
    mteb.evaluate(model, mteb.get_tasks(tasks=["CIFAR100ZeroShot", "SOPI2IRetrieval"]))

It is mteb's EncoderProtocol (mteb 2, mteb/models/models_protocols.py) in NumPy, without torch.
Scores of mteb's tasks go by mteb's own protocols.  Its ROxford and RParis tasks are headed by mAP
of the first 5 and its Met task by the hit rate at 1, other metrics than the trapezoid mAP and GAP
of the literature, which `mofi_jax.evaluate` gives: never put both in one table.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from mofi_jax.model import mofi


class MtebModel:
    """A model as mteb asks it: batches of pictures, texts or both in, one vector each out.

    Args:
      model: what `mofi_jax.load` returns.
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

        total = self._model.embed_images(pictures())  # empties `inputs` of texts too
        if texts:
            words = self._model.embed_texts(texts)
            total = total + words if len(total) else words
        return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)

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

"""The features that evaluators compare: of picture sets, each embedded once, and of texts."""

from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
import tqdm
from jaxtyping import Float

from mofi_jax.common.errors import BadInput
from mofi_jax.data import ops
from mofi_jax.evaluators.sets.pictures import PictureSet

_THREADS = 8
_CHUNK = 1024  # pictures decoded ahead of the devices: 150 MB at 224 pixels


class Embedder:
    """A model as evaluators see it: its parameters, and features by them, the same on every host.

    One serves all evaluators of a round, which so share the features of a picture set.
    """

    def __init__(self, towers: Any, params: Any):
        self.towers, self.params = towers, params
        self._features: dict[str, np.ndarray] = {}

    def pictures(self, pictures: PictureSet) -> Float[np.ndarray, "n d"]:
        """Features of a picture set, float32, L2-normalised, in its order.

        Raises:
          BadInput: a picture that cannot be decoded (skipping it would change the metric), or
            features that are not finite.
        """
        key = str(pictures.path)
        if key not in self._features:
            self._features[key] = _finite(self._embed(pictures))
        return self._features[key]

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Features of texts, float32, L2-normalised; BadInput if they are not finite."""
        return _finite(self.towers.embed_texts(self.params, texts).astype(np.float32))

    def _embed(self, pictures: PictureSet) -> np.ndarray:
        # Every host reads all pictures and runs the same number of batches, so that no collective
        # waits for a host that has finished.  Threads decode one chunk ahead of the devices.
        def decode(i: int) -> np.ndarray:
            try:
                return self.towers.decode(pictures.read(i))
            except ops.UndecodableImage as error:
                raise BadInput(
                    f"{pictures.names[i]} in {pictures.path} cannot be decoded ({error}): fetch "
                    "the picture set again, since scores are comparable only on the complete set."
                ) from None

        features = []
        bar = tqdm.tqdm(
            total=len(pictures),
            desc=f"embed {pictures.path.name}",
            unit="img",
            leave=False,
            delay=2,
            disable=None if jax.process_index() == 0 else True,  # None: shown on terminals only
        )
        with futures.ThreadPoolExecutor(_THREADS) as pool, bar:
            jobs = [pool.submit(decode, i) for i in range(min(_CHUNK, len(pictures)))]
            for start in range(0, len(pictures), _CHUNK):
                images = np.stack([job.result() for job in jobs])
                following = range(start + _CHUNK, min(start + 2 * _CHUNK, len(pictures)))
                jobs = [pool.submit(decode, i) for i in following]
                features.append(self.towers.embed_images(self.params, images))
                bar.update(len(images))
        return np.concatenate(features).astype(np.float32, copy=False)


def picture_card(towers: Any, pictures: PictureSet) -> dict[str, Any]:
    """The part of a protocol card that concerns the pictures and their features."""
    return {
        "pictures": len(pictures),
        "classes": len(np.unique(pictures.classes)),
        "sha256": pictures.sha256(),
        "preprocessing": towers.preprocess,
        "feature": f"{type(towers).__name__}.embed_images (towers: after the projection), float32",
        "normalisation": "L2",
    }


def _finite(features: np.ndarray) -> np.ndarray:
    # NaN compares false with everything, which would give every relevant row rank 1.
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise BadInput(
            f"The features are not finite (row {bad[0]}): the model has diverged or its weights "
            "are damaged; use an earlier checkpoint."
        )
    return features

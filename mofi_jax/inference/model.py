"""A model in use: pictures and words in, arrays and names out."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from mofi_jax.common.errors import BadInput
from mofi_jax.inference import pictures
from mofi_jax.inference.towers import Towers, unit
from mofi_jax.model import mofi

_MOST = 10.0  # beyond any normalised pixel: they lie within 3


class Entity(NamedTuple):
    """What a picture shows, by the class table."""

    qid: str  # the knowledge base's identifier
    name: str
    description: str  # may be ""
    score: float  # cosine


@dataclasses.dataclass(frozen=True)
class Model:
    """Towers with their parameters.

    In a multi-host job every host passes the same inputs and gets all results.
    """

    towers: Towers = dataclasses.field(repr=False)
    params: mofi.Params = dataclasses.field(repr=False)  # on the devices of `towers.mesh`
    description: str  # where it came from, for tables and logs

    def embed_images(self, images: Any, preprocessed: bool = False) -> Float32[np.ndarray, "n d"]:
        """L2-normalised embeddings of pictures.

        Args:
          images: one picture or an iterable of them, in any mixture of forms and sizes: paths,
            bytes of files, Pillow pictures, arrays uint8 [h, w, 3], [h, w, 4] or [h, w]. The EXIF
            orientation is applied and alpha is blended with white, as in training.
          preprocessed: `images` is float [n, s, s, 3] at the model's size, RGB, after the division
            by 255, the mean and the standard deviation of the model's family
            (`model.image.pixel_statistics`): CLIP's also where a folder's image processor has
            others, which its weights have taken in.

        Raises BadInput: with the number and path of a picture that cannot be used.
        """
        if preprocessed:
            return self.towers.embed_images(self.params, self._normalised(images))
        size = self.towers.batch_size
        batches = pictures.batches(pictures.several(images), self.towers.decode, size)
        side = self.towers.image_size
        first = next(batches, np.zeros((0, side, side, 3), np.uint8))
        if len(first) < size:
            return self.towers.embed_images(self.params, first)
        batches = itertools.chain([first], batches)
        return np.concatenate([*self.towers.embed_image_batches(self.params, batches)])

    def embed_texts(self, texts: Any) -> Float32[np.ndarray, "n d"]:
        """L2-normalised embeddings of a string or an iterable of strings, of any length.

        Raises BadInput: what is no text, or a model without a text tower.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise BadInput(f"Text {i} is of type {type(text).__name__}: give strings.")
        return self.towers.embed_texts(self.params, texts)

    def similarity(self, a: Any, b: Any) -> Float32[np.ndarray, "n m"]:
        """Cosines of embeddings [n, d] and [m, d]; BadInput for arrays of other shapes."""
        a, b = (np.asarray(array, np.float32) for array in (a, b))
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
            raise BadInput(
                f"Embeddings of {list(a.shape)} and {list(b.shape)} have no cosines: give arrays "
                "[n, d] and [m, d]."
            )
        return unit(a) @ unit(b).T

    def name_entities(self, images: Any, k: int = 5) -> list[list[Entity]]:
        """For each picture the `k` nearest entities of the whole vocabulary, best first.

        Args:
          images: as of `embed_images`.

        Raises BadInput: as `embed_images`; a model without class table; k beyond the vocabulary.
        """
        return self.nearest_entities(self.embed_images(images), k)

    def nearest_entities(
        self, embeddings: Float32[np.ndarray, "n d"], k: int = 5
    ) -> list[list[Entity]]:
        """As `name_entities`, for embeddings of pictures."""
        ids, cosines = self.towers.nearest_entities(self.params, embeddings, k)
        known = self.towers.entities
        return [
            [
                Entity(known.qids[i], known.names[i], known.descriptions[i], cosine)
                for i, cosine in zip(*row, strict=True)
            ]
            for row in zip(ids.tolist(), cosines.tolist(), strict=True)
        ]

    def _normalised(self, images: Any) -> Float32[np.ndarray, "n s s 3"]:
        size = self.towers.image_size
        pixels = np.asarray(images)
        what = f"{list(pixels.shape)} of {pixels.dtype}"
        if pixels.dtype.kind == "f" and pixels.shape[1:] == (size, size, 3):
            pixels = pixels.astype(np.float32, copy=False)
            # NaN compares false.
            if np.abs(pixels).max(initial=0) <= _MOST:
                return pixels
            what += " with values that are not"
        raise BadInput(
            f"Preprocessed images are normalised pixels, float [n, {size}, {size}, 3], and these "
            f"are {what}: divide by 255, subtract the mean, divide by the standard deviation, or "
            "give pictures without preprocessed=True."
        )

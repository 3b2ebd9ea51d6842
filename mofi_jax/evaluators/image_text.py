"""Image-text retrieval: pictures among texts and texts among pictures.

R@k is CLIP's: the share of queries with at least one of what belongs to them among the first k
(LAION-AI/CLIP_benchmark, zeroshot_retrieval).  With the captions of COCO or Flickr30k in Karpathy's
test split (`sets.captions`) these are the published numbers: five captions a picture, each a query
of its own, no prompt.  With one text per class, such as the names or descriptions of entities, the
pictures of a class belong to it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.evaluators import retrieval
from mofi_jax.evaluators.features import embedding, neighbours
from mofi_jax.evaluators.pages import gallery
from mofi_jax.evaluators.scores import ranking
from mofi_jax.evaluators.scores.intervals import Estimate
from mofi_jax.evaluators.sets import captions as caption_files
from mofi_jax.evaluators.sets import pictures as picture_sets

PLACES = (1, 5, 10)  # k of R@k


class Evaluator:
    """R@1, 5 and 10 in both directions, and mAP of texts that belong to several pictures.

    Args:
      images: a picture set (`sets.pictures.read_set`).
      captions: texts of its pictures or classes (`sets.captions`); without them, the labels of
      classes: class table (`sets.pictures.read_classes`), by default of the set's own layout.

    Raises BadInput: unusable set or texts, or both captions and classes.
    """

    needs = ("tokenizer",)

    def __init__(
        self,
        towers: Any,
        *,
        images: epath.PathLike,
        captions: epath.PathLike = "",
        classes: epath.PathLike = "",
    ):
        if captions and classes:
            raise BadInput("The kind image_text takes `captions` or `classes`: leave one out.")
        self.towers = towers
        self.pictures = picture_sets.read_set(images)
        if captions:
            self.captions = caption_files.read_captions(captions, self.pictures)
        else:
            table = picture_sets.read_classes(classes, self.pictures)
            numbers, things = np.unique(self.pictures.classes, return_inverse=True)
            texts = tuple(table[int(number)].label for number in numbers)
            self.captions = caption_files.Captions(texts, np.arange(len(numbers)), things)

    def run(self, embedder: embedding.Embedder) -> Iterator[tuple[str, float]]:
        """Yields, 0..1, ``text_to_image_recall_at_{1,5,10}``, ``image_to_text_recall_at_{1,5,10}``.

        Where a thing has several pictures, also ``text_to_image_map``: by the ranks of all of them.
        """
        texts, images = self.features(embedder)
        text_things, picture_things = self.captions.text_things, self.captions.picture_things
        for direction, queries, index, own, other in (
            ("text_to_image", texts, images, text_things, picture_things),
            ("image_to_text", images, texts, picture_things, text_things),
        ):
            rows, _ = neighbours.top_k(queries, index, max(PLACES))
            found = (rows != neighbours.NO_ROW) & (other[rows] == own[:, None])
            relevant = np.bincount(other)[own]
            for k in PLACES:
                recall = ranking.recall_at(ranking.hits(found), relevant, k)
                yield f"{direction}_recall_at_{k}", Estimate.mean(recall, own)
        if len(np.unique(picture_things)) < len(picture_things):
            relevant = retrieval.same_class(text_things, picture_things)
            ranks = neighbours.ranks(texts, images, relevant)
            precision = ranking.average_precision(ranks)
            yield "text_to_image_map", Estimate.mean(precision, text_things)

    def features(
        self, embedder: embedding.Embedder
    ) -> tuple[embedding.Features, embedding.Features]:
        """Of the texts and of the pictures."""
        texts = embedding.Features.of(embedder.texts(self.captions.texts), self.towers.mesh)
        return texts, embedder.pictures(self.pictures)

    def search(self, title: str) -> gallery.Search:
        """What a page shows: pictures found by texts, each with the first of its own."""
        texts, things = self.captions.text_things, self.captions.picture_things
        _, first = np.unique(texts, return_index=True)
        return gallery.Search(
            title,
            queries=None,
            query_words=self.captions.texts,
            index=self.pictures,
            index_words=[self.captions.texts[first[thing]] for thing in things],
            leave_out=np.zeros((len(texts), 0), np.int64),
            right=lambda asked, rows: things[rows] == texts[asked][:, None],
            relevant=np.bincount(things)[texts],
        )

    def card(self) -> dict[str, Any]:
        """The protocol card, with the hash of the pictures."""
        texts = self.captions.texts
        return {
            "protocol": "R@k: any of what belongs to the query is among the first k, by cosine",
            **embedding.picture_card(self.towers, self.pictures),
            "texts": len(texts),
            "equal_texts": len(texts) - len(set(texts)),
            "texts_of_a_picture": f"the first {caption_files.FIRST}",
            "prompt": "the text alone",
            "ties": "recall: the lower row comes first; map: mean",
        }

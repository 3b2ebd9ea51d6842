"""Prompt templates by name, as they were published; ``{}`` is where the class name goes.

`openai_imagenet` and its subset are those of openai/CLIP notebooks/Prompt_Engineering_for_ImageNet
(80 templates in their order there; the 7 that a forward selection on ImageNet kept, so they flatter
scores on ImageNet a little), `openai_cifar` is that of CIFAR10 and CIFAR100 in openai/CLIP
data/prompts.md.  Texts are kept to the letter, "a origami" included: scores depend on them.
"""

from collections.abc import Sequence

from mofi_jax.common.errors import BadInput

_OPENAI_IMAGENET = """\
a bad photo of a {}.
a photo of many {}.
a sculpture of a {}.
a photo of the hard to see {}.
a low resolution photo of the {}.
a rendering of a {}.
graffiti of a {}.
a bad photo of the {}.
a cropped photo of the {}.
a tattoo of a {}.
the embroidered {}.
a photo of a hard to see {}.
a bright photo of a {}.
a photo of a clean {}.
a photo of a dirty {}.
a dark photo of the {}.
a drawing of a {}.
a photo of my {}.
the plastic {}.
a photo of the cool {}.
a close-up photo of a {}.
a black and white photo of the {}.
a painting of the {}.
a painting of a {}.
a pixelated photo of the {}.
a sculpture of the {}.
a bright photo of the {}.
a cropped photo of a {}.
a plastic {}.
a photo of the dirty {}.
a jpeg corrupted photo of a {}.
a blurry photo of the {}.
a photo of the {}.
a good photo of the {}.
a rendering of the {}.
a {} in a video game.
a photo of one {}.
a doodle of a {}.
a close-up photo of the {}.
a photo of a {}.
the origami {}.
the {} in a video game.
a sketch of a {}.
a doodle of the {}.
a origami {}.
a low resolution photo of a {}.
the toy {}.
a rendition of the {}.
a photo of the clean {}.
a photo of a large {}.
a rendition of a {}.
a photo of a nice {}.
a photo of a weird {}.
a blurry photo of a {}.
a cartoon {}.
art of a {}.
a sketch of the {}.
a embroidered {}.
a pixelated photo of a {}.
itap of the {}.
a jpeg corrupted photo of the {}.
a good photo of a {}.
a plushie {}.
a photo of the nice {}.
a photo of the small {}.
a photo of the weird {}.
the cartoon {}.
art of the {}.
a drawing of the {}.
a photo of the large {}.
a black and white photo of a {}.
the plushie {}.
a dark photo of a {}.
itap of a {}.
graffiti of the {}.
a toy {}.
itap of my {}.
a photo of a cool {}.
a photo of a small {}.
a tattoo of the {}."""

_OPENAI_IMAGENET_SUBSET = """\
itap of a {}.
a bad photo of the {}.
a origami {}.
a photo of the large {}.
a {} in a video game.
art of the {}.
a photo of the small {}."""

_OPENAI_CIFAR = """\
a photo of a {}.
a blurry photo of a {}.
a black and white photo of a {}.
a low contrast photo of a {}.
a high contrast photo of a {}.
a bad photo of a {}.
a good photo of a {}.
a photo of a small {}.
a photo of a big {}.
a photo of the {}.
a blurry photo of the {}.
a black and white photo of the {}.
a low contrast photo of the {}.
a high contrast photo of the {}.
a bad photo of the {}.
a good photo of the {}.
a photo of the small {}.
a photo of the big {}."""

TEMPLATES = {
    "openai_imagenet": tuple(_OPENAI_IMAGENET.splitlines()),
    "openai_imagenet_subset": tuple(_OPENAI_IMAGENET_SUBSET.splitlines()),
    "openai_cifar": tuple(_OPENAI_CIFAR.splitlines()),
}


def templates(given: str | Sequence[str]) -> tuple[str, ...]:
    """Prompts by the name of a set (`TEMPLATES`), or a list of them as it is.

    Raises BadInput: an unknown name, an empty list, or a prompt without its one ``{}``.
    """
    if isinstance(given, str):
        if given not in TEMPLATES:
            raise BadInput(
                f"There are no `templates` named {given!r}: choose from {', '.join(TEMPLATES)}, or "
                "give a list of prompts."
            )
        return TEMPLATES[given]
    if not given or any(template.count("{}") != 1 for template in given):
        raise BadInput(
            f"`templates` is {list(given)}: give prompts with one {{}} each, such as "
            '"a photo of a {}".'
        )
    return tuple(given)

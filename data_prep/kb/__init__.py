"""Wikidata, WordNet or JSON lines -> a knowledge base: names, priors, kinds, descriptions.

build           the stage and the command's core; `parts` and `merge` are its two halves
dump            a file of entities in pieces that workers read side by side
rows            one entity: its columns, its names with their weights, the generic JSON lines
wikidata        one line of Wikidata's dump as such a row; wordnet: hypernyms for kinds
names           the normal form by which captions and names meet; anchors: counts of links
lookup          KnowledgeBase: memory-mapped, what the linker asks
spacy_adapter   the same as spaCy's KnowledgeBase
"""

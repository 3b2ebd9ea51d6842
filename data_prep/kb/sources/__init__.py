"""What a knowledge base is built from: Wikidata's dump, WordNet's folder, JSON lines.

dump       finds the format, cuts a file into pieces that workers read side by side
rows       one entity: its columns, its names with their weights, the generic JSON lines
wikidata   one line of Wikidata's dump as such a row; wordnet: its folder as JSON lines
guess      kinds from descriptions and labels, by nouns.tsv.gz, which `nouns` makes
tables     what a user adds: parquet or TSV; anchors: counts of links, joined to the names
wikipedia  its dump as such counts; wikitext: links and text of an article
"""

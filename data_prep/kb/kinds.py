"""What sort of thing an entity is: one of a few kinds, coarse enough to be told without error.

A kind says whether an entity can be seen in a picture, whether its name has parts that stand for it
(people), and which label of a named-entity recognizer agrees with it.
"""

from __future__ import annotations

# A kind's place is its code in the files; new ones are added at the end.
KINDS = (
    "person",
    "character",  # fictional or mythical
    "name",  # a family or given name itself
    "group",  # organisations, teams, bands, peoples
    "place",  # with borders or inhabitants: countries, cities, regions
    "building",
    "work",  # films, books, songs, paintings
    "product",  # brands; vehicles and machines by model
    "event",  # and what is done: sports, acts
    "animal",
    "plant",
    "food",
    "artifact",
    "nature",  # mountains, lakes, stars, weather
    "substance",
    "body",  # parts of bodies
    "communication",  # languages, signs, words, messages
    "time",
    "quantity",
    "wikimedia",  # pages about pages: disambiguations, categories, lists
    "abstract",
)
GIVEN, GUESSED = "given", "guessed"  # what `kind_from` may say

# WordNet's lexicographer files of nouns, in the order of their numbers from 3 on (lexnames(5WN)),
# and their kinds. The tops of the hierarchy ("animal", "entity") are of all kinds.
LEXNAMES: dict[str, str | None] = {
    "noun.Tops": None,
    "noun.act": "event",
    "noun.animal": "animal",
    "noun.artifact": "artifact",
    "noun.attribute": "abstract",
    "noun.body": "body",
    "noun.cognition": "abstract",
    "noun.communication": "communication",
    "noun.event": "event",
    "noun.feeling": "abstract",
    "noun.food": "food",
    "noun.group": "group",
    "noun.location": "place",
    "noun.motive": "abstract",
    "noun.object": "nature",
    "noun.person": "person",
    "noun.phenomenon": "nature",
    "noun.plant": "plant",
    "noun.possession": "abstract",
    "noun.process": "abstract",
    "noun.quantity": "quantity",
    "noun.relation": "abstract",
    "noun.shape": "abstract",
    "noun.state": "abstract",
    "noun.substance": "substance",
    "noun.time": "time",
}
FIRST_NOUNS = 3  # the number of the first of these files

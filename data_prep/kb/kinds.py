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

# Classes and taxa of Wikidata, and synsets of WordNet 3.0, that make a kind of all below them; the
# nearest counts, of equally near ones the first in this list. Each id was found with its label or
# the like in public lists of classes or queries, none in a dump; a label may be an alias by now:
# `closure` warns where a base has an id with neither.
_ROOTS = """
person: Q5 human, Q215627 person, n00007846 person
character: Q15632617 fictional human, Q95074 fictional character, Q3658341 literary character
character: Q15773317 television character, Q15773347 film character, Q1114461 comics character
character: Q4271324 mythical character, Q178885 deity, Q20643955 human biblical figure
character: Q21070568 human whose existence is disputed, Q2239243 mythical creature
character: Q24334685 mythical entity, Q14897293 fictional entity, n09587565 fictional character
character: n09505418 deity, n09483738 imaginary being
name: Q101352 family name, Q12308941 male given name, Q11879590 female given name
name: Q3409032 unisex given name, Q202444 given name, Q10856962 anthroponym, Q82799 name
name: n06336904 surname, n06337307 first name
wikimedia: Q4167410 Wikimedia disambiguation page
wikimedia: Q22808320 Wikimedia human name disambiguation page, Q4167836 Wikimedia category
wikimedia: Q13406463 Wikimedia list article, Q11266439 Wikimedia template
wikimedia: Q15184295 Wikimedia module, Q14204246 Wikimedia project page
wikimedia: Q17442446 Wikimedia internal item, Q17633526 Wikinews article
work: Q11424 film, Q24862 short film, Q202866 animated film, Q226730 silent film
work: Q24856 film series, Q5398426 television series, Q1259759 miniseries
work: Q15416 television program, Q21191270 television series episode
work: Q63952888 anime television series, Q7889 video game, Q482994 album, Q134556 single
work: Q7366 song, Q2188189 musical work, Q105543609 musical work/composition, Q1344 opera
work: Q25379 play, Q571 book, Q8261 novel, Q7725634 literary work, Q47461344 written work
work: Q5185279 poem, Q49084 short story, Q277759 book series, Q3331189 edition
work: Q1004 comics, Q21198342 manga series, Q3305213 painting, Q93184 drawing, Q11060274 print
work: Q125191 photograph, Q860861 sculpture, Q179700 statue, Q4502142 visual artwork
work: Q838948 work of art, Q11032 newspaper, Q41298 magazine, Q5633421 scientific journal
work: Q1002697 periodical, Q13442814 scholarly article, Q191067 article, Q732577 publication
work: Q87167 manuscript, Q17537576 creative work, Q386724 work, n06613686 movie, n06410904 book
work: n06364329 literary composition, n06591815 album, n07037465 musical composition
work: n06619065 show, n06589574 publication, n07007945 play, n03876519 painting
work: n03925226 photograph, n06362953 writing, n04157320 sculpture
building: Q16970 church building, Q2977 cathedral, Q32815 mosque, Q44539 temple, Q34627 synagogue
building: Q44613 monastery, Q33506 museum, Q7075 library, Q16917 hospital, Q27686 hotel
building: Q24354 theatre building, Q483110 stadium, Q23413 castle, Q16560 palace
building: Q57821 fortification, Q3947 house, Q11303 skyscraper, Q12518 tower, Q39715 lighthouse
building: Q12280 bridge, Q12323 dam, Q44377 tunnel, Q4989906 monument, Q55488 railway station
building: Q719456 station, Q1248784 airport, Q41176 building, Q1497375 architectural ensemble
building: Q811979 architectural structure, Q13226383 facility, n02913152 building
building: n02898711 bridge, n03800563 museum, n04460130 tower, n04306080 station
building: n04295881 stadium
product: Q3231690 automobile model, Q59773381 automobile model series, Q15056993 aircraft family
product: Q15056995 aircraft model, Q811704 rolling stock class, Q19832486 locomotive class
product: Q559026 ship class, Q15142894 weapon model, Q19723451 smartphone model
product: Q20741022 digital camera model, Q20888659 camera model, Q10929058 product model
product: Q431289 brand, Q167270 trademark, Q7397 software, Q35127 website, Q2424752 product
product: n06845599 brand
group: Q215380 musical group, Q2088357 musical ensemble, Q476028 association football club
group: Q847017 sports club, Q12973014 sports team, Q15991303 association football league
group: Q623109 sports league, Q4438121 sports organization, Q4830453 business, Q783794 company
group: Q891723 public company, Q6881511 enterprise, Q22687 bank, Q46970 airline
group: Q18127 record label, Q2085381 publisher, Q15265344 broadcaster, Q1616075 television station
group: Q7278 political party, Q7210356 political organization, Q327333 government agency
group: Q176799 military unit, Q3918 university, Q3914 school, Q9842 primary school
group: Q2385804 educational institution, Q31855 research institute, Q163740 nonprofit organization
group: Q43229 organization, Q41710 ethnic group, Q2472587 people, Q8436 family
group: Q16334295 group of humans, Q33829 human population, Q874405 social group, n00031264 group
place: Q515 city, Q1549591 big city, Q5119 capital, Q3957 town, Q532 village, Q15284 municipality
place: Q484170 commune of France, Q486972 human settlement, Q123705 neighborhood, Q6256 country
place: Q3624078 sovereign state, Q7275 state, Q10864048 first-level administrative division
place: Q56061 administrative territorial entity, Q1048835 political territorial entity
place: Q15642541 human-geographic territorial entity, Q1496967 territorial entity, Q5107 continent
place: Q79007 street, Q34442 road, Q728937 railway line, Q22698 park, Q174782 square
place: Q39614 cemetery, Q44782 port, Q46169 national park, Q473972 protected area
place: Q839954 archaeological site, Q82794 geographic region, n08226699 village
place: n00027167 location
nature: Q8502 mountain, Q46831 mountain range, Q54050 hill, Q8072 volcano, Q39816 valley
nature: Q8514 desert, Q35509 cave, Q35666 glacier, Q34038 waterfall, Q4022 river, Q23397 lake
nature: Q165 sea, Q9430 ocean, Q39594 bay, Q40080 beach, Q185113 cape, Q23442 island, Q4421 forest
nature: Q15324 body of water, Q271669 landform, Q205895 landmass, Q523 star, Q318 galaxy
nature: Q3863 asteroid, Q634 planet, Q2537 natural satellite, Q3559 comet, Q44559 exoplanet
nature: Q6999 astronomical object, Q1322005 natural phenomenon, Q11663 weather
nature: n00019128 natural object, n00034213 phenomenon
animal: Q729 animal, Q38829 breed, Q39367 dog breed, Q43577 cat breed, Q1160573 horse breed
animal: Q144 dog, Q146 house cat, Q726 horse, Q7377 mammal, Q5113 bird, Q10811 reptile
animal: Q10908 amphibian, Q152 fish, Q1390 insect, Q430 dinosaur, Q26401003 individual animal
animal: n00015388 animal
plant: Q756 plant, Q764 Fungi, Q10884 tree, Q506 flower, Q4886 cultivar, n00017222 plant
food: Q40050 drink, Q154 alcoholic beverage, Q282 wine, Q44 beer, Q134768 cocktail
food: Q746549 dish, Q10943 cheese, Q7802 bread, Q3314483 fruit, Q11004 vegetable
food: Q25403900 food ingredient, Q2095 food, n00021265 food
event: Q198 war, Q178561 battle, Q40231 election, Q27020041 sports season, Q500834 tournament
event: Q13406554 sports competition, Q18608583 recurring sporting event, Q16510064 sporting event
event: Q132241 festival, Q464980 exhibition, Q182832 concert, Q3839081 disaster, Q349 sport
event: Q1656682 event, Q1190554 occurrence, Q1914636 activity, n00029378 event, n00030358 act
artifact: Q1420 motor car, Q11436 aircraft, Q11446 ship, Q870 train, Q42889 vehicle, Q728 weapon
artifact: Q39546 tool, Q11019 machine, Q68 computer, Q1183543 device, Q10273457 equipment
artifact: Q34379 musical instrument, Q11460 clothing, Q161439 jewelry, Q14745 furniture
artifact: Q11422 toy, Q987767 container, Q41207 coin, Q14660 flag, Q14659 coat of arms
artifact: Q220659 archaeological artefact, Q8205328 artificial physical object, n00021939 artifact
substance: Q11344 chemical element, Q11173 chemical compound, Q113145171 type of chemical entity
substance: Q79529 chemical substance, Q12140 medication, Q7946 mineral, Q12089225 mineral species
substance: Q8063 rock, Q214609 material, Q8054 protein, Q7187 gene, n00019613 substance
substance: n00020090 substance, n00020827 matter
body: Q712378 organ, Q4936952 anatomical structure
communication: Q34770 language, Q33742 natural language, Q1288568 modern language
communication: Q17376908 languoid, Q8192 writing system, Q9788 letter, Q80071 symbol
communication: n00033020 communication
time: Q577 year, Q3186692 calendar year, Q39911 decade, Q578 century, Q5151 month, Q573 day
time: Q47150325 calendar day of a given year, Q47018478 calendar month of a given year
time: Q47018901 calendar month, Q14795564 point in time with respect to recurrent timeframe
time: Q11514315 historical period, Q186081 time interval
time: n00028270 time
quantity: Q12503 integer, Q21199 natural number, Q11563 number, Q47574 unit of measurement
quantity: Q107715 physical quantity, Q309314 quantity, n00033615 measure
abstract: Q12136 disease, Q2057971 health problem, Q11862829 academic discipline
abstract: Q188451 music genre, Q201658 film genre, Q483394 genre, Q9174 religion, Q7257 ideology
abstract: Q8142 currency, Q618779 award, Q4164871 position, Q65943 theorem, Q3249551 process
abstract: Q937228 property, Q9081 knowledge, Q151885 concept, Q7184903 abstract entity
abstract: n00023100 psychological feature, n00024264 attribute, n00024720 state, n00026192 feeling
abstract: n00027807 shape, n00029677 process, n00031921 relation, n00032613 possession
abstract: n00002137 abstraction
"""
# Classes of classes: they say nothing of their instances, which go by what they are subclasses of.
_META = """
Q28640 profession, Q12737077 occupation, Q16521 taxon, Q16889133 class, Q5127848 class
Q24017414 second-order class, Q19361238 Wikidata metaclass
Q55983715 organisms known by a particular common name
"""


def _read(text: str) -> list[tuple[str, str, str | None]]:
    rows = [line.rpartition(": ")[::2] for line in text.strip().splitlines()]
    return [
        (*root.partition(" ")[::2], kind or None)
        for kind, roots in rows
        for root in roots.split(", ")
    ]


_ALL = (*_read(_ROOTS), *_read(_META))
ROOTS: tuple[tuple[str, str | None], ...] = tuple((root, kind) for root, _, kind in _ALL)
LABELS: dict[str, str] = {root: label for root, label, _ in _ALL}

"""Captions -> mentions -> candidate entities. pairs/ -> links/. No picture is looked at here.

stage          the stage: every caption once
mentions       what a caption mentions: names of the base, spaCy's, people by a part of their name
ner            what spaCy finds, and which kinds its types agree with
words          what case, dictionary and calendar say about a name
people         whom "Mr. Singh" or "Smith, Howard" may be
languages      the language of a caption, where the base has several
boilerplate    what captions of the web say about the page, the file or the shop
disambiguate   how likely a mention means each of its candidates, or nothing
given          in place of all these, entities that come with the data; entitynet: from tables
rows           links/ as flat arrays: what later stages compute on
"""

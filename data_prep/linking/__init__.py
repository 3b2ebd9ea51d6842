"""Captions -> mentions -> candidate entities. pairs/ -> links/. No picture is looked at here.

stage          the stage: every caption once
ner            the mentions that spaCy finds
boilerplate    what captions of the web say about the page, the file or the shop
disambiguate   which candidates of a mention the caption itself makes likely
given          in place of all these, entities that come with the data; entitynet: from tables
rows           links/ as flat arrays: what later stages compute on
"""

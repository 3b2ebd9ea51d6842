"""Evaluators: each is a file of this folder with a class ``Evaluator``, found by the file's name.

`classification` is the example to start from.  A new one needs

* ``__init__(self, towers, **cfg)``: reads and checks its files.  ``towers`` are a model's functions
  (`mofi_jax.inference.Towers`, or `RawPixels`), whose ``mesh`` holds the devices; ``cfg`` are the
  keys of its entry in ``config.evaluators`` beside ``kind``, the file's name.
* ``run(self, embedder)``: yields (metric, value) pairs from what `features.embedding.Embedder`
  gives, the parameters and the features of picture sets, on every host alike; a score over queries
  or pictures is a `scores.intervals.Estimate`, a float that can tell its interval.
* ``search(self, title)`` and ``features(self, embedder)``, of a kind that looks for something: a
  `pages.gallery.Search` and the features of its queries and its index, for the page.
* ``card(self)``: the protocol card, the facts without which the numbers mean nothing.
* ``needs``: the attributes of the towers that must not be None, or it is left out.

`suite` builds and runs them, `sets` reads their files, `features` are compared on the devices,
`scores` are the metrics.
"""

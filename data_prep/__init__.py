"""Noisy image-text pairs in, labelled ArrayRecord shards and a data card out.

Five commands (`build_i2e`, `build_kb`, `build_anchors`, `label_quality`, `remove_keys`) and nine
rooms, in the order in which data flows: engine < pairs, kb < linking < selection < filters <
dataset < card, quality. A room uses only those before it.
"""

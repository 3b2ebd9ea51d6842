"""Image-text pairs in whatever form -> pairs/: key, text and a pointer to the picture's bytes.

stage       the stage: reads every sample once; later stages fetch pictures by pointer
unique      of pairs with the same key the first one stays
files       which files `config.sources` means
formats     how each kind of file is read: tars, parquet, tables, TFDS
samples     one pair as it was found, and the rules for its words
ahead       threads that read and decode before it is asked for
pictures    which pictures can be used, and a hash by which near-copies find each other
"""

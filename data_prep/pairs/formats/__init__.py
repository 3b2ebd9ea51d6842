"""How each kind of source is read: `read(inputs, part, keep, counts)` yields samples.

tars        img2dataset's tars, and what lies beside
folders     pictures with captions beside them, as if they were in a tar
parquets    parquet and Arrow, with the pictures in it or beside
tables      .csv, .tsv and .jsonl beside pictures
tfds_sets   data sets of TensorFlow Datasets in ArrayRecord
"""

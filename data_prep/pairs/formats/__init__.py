"""How each kind of source is read: `read(inputs, part, keep, counts)` yields samples.

tars        img2dataset's tars or folders, and what lies beside
parquets    parquet with the pictures in it
tables      .csv, .tsv and .jsonl beside pictures
tfds_sets   data sets of TensorFlow Datasets in ArrayRecord
"""

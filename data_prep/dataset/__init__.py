"""The data set: vocabulary, order, ArrayRecord shards with TFDS metadata, versions, publication.

vocabulary   which entities are classes, and their ids
order        which pair goes into which shard, at which place
shards       the stage that writes records
files        what lies beside the shards: TFDS metadata, tokenizer
versions     a finished version: its metadata, and where each record is
remove       the next version, without some of its records
publish      copies a version to where others read it
"""

"""Pictures of any names, in whatever they lie.

containers    finds them below a path, and reads one by its place
tar_headers   where the files of a tar lie
parquets      rows of parquet files
examples      records of anybody's schema
"""

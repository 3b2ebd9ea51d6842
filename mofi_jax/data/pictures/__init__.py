"""Pictures of any names, in whatever they lie.

containers    finds them below a path, and reads one by its place
tar_headers   where the files of a tar lie
parquets      rows of parquet and Arrow files
arrow_files   the latter, read as the former are
tree          what lies below a folder, and which split it is
examples      records of anybody's schema
"""

"""What may not be published, what occurs twice, entities with too many or too few pictures.

stage            the order of the filters; labels/ -> labels_final/
removed          the removal list
decontaminate    pictures of evaluation sets; eval_sets: which files those are
nearest          which of them cosines tell, and how near that is
copies           pictures that occur more than once, byte for byte
safety           domains, hashes, columns and scores that are blocked
frequency        how many pictures an entity may have, and needs
"""

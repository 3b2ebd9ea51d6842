"""The losses, each a function of embeddings and a mask; `training.step.TASKS` calls them.

* `entity.entity_softmax`: large-margin softmax over all entities (CosFace, ArcFace), and with
  `entity_sampling.draw` over a sample of them (Partial FC).  `entity_topk`: nearest entities.
* `contrastive.clip_softmax`: images against texts, CLIP.  `siglip.siglip`: the same, SigLIP.

A new loss leaves masked rows out of value and gradient, returns the sums over the global batch and
the count of its rows (`blocks.LossSum`), and has a dense reference in its file, differentiated by
jax, which its tests compare with the sharded function, gradients included, on several meshes.
"""

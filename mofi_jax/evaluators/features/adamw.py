"""The linear probe of LAION-AI/CLIP_benchmark: epochs of AdamW, over features on the devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int32

from mofi_jax.distributed import meshes, sharding
from mofi_jax.evaluators.features import linear
from mofi_jax.evaluators.features.embedding import Features
from mofi_jax.losses import blocks

EPOCHS = 20
BATCH = 512
LEARNING_RATE = 0.1


class Trainer:
    """Trains with one weight decay after the other, each from the same start and batches."""

    def __init__(self, features: Features, classes: int, *, seed: int):
        self.features, self.classes, self.seed = features, classes, seed

    def __call__(
        self, labels: Int32[np.ndarray, " n"], strength: float
    ) -> tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"]]:
        """Weights and bias; rows labelled `linear.NO_LABEL` take no part."""
        order, start = self.plan(labels)
        targets = np.append(labels, linear.NO_LABEL).astype(np.int32)[order]
        inputs = order, targets, start, np.float32(strength)
        inputs = sharding.put(self.features.mesh, inputs)
        found = _train(self.features.rows, *inputs, mesh=self.features.mesh)
        return tuple(np.asarray(part) for part in found)

    def plan(
        self, labels: Int32[np.ndarray, " n"]
    ) -> tuple[Int32[np.ndarray, "steps b"], tuple[np.ndarray, np.ndarray]]:
        """The rows of each batch, n where the last of an epoch has none, and the first weights."""
        generator = np.random.default_rng(self.seed)
        rows, dim = np.flatnonzero(labels != linear.NO_LABEL), self.features.rows.shape[1]
        order = np.full((EPOCHS, -(-len(rows) // BATCH) * BATCH), len(labels), np.int32)
        for epoch in order:
            epoch[: len(rows)] = generator.permutation(rows)
        bound = dim**-0.5  # as torch.nn.Linear
        shapes = (dim, self.classes), (self.classes,)
        weights, bias = (generator.uniform(-bound, bound, shape) for shape in shapes)
        return order.reshape(-1, BATCH), (weights.astype(np.float32), bias.astype(np.float32))


@functools.partial(jax.jit, static_argnames="mesh")
def _train(rows, order, targets, start, strength, *, mesh: Mesh):
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, len(order))
    optimizer = optax.adamw(schedule, weight_decay=strength)  # torch's rule; the bias decays too

    def loss(model, part, labels):
        weights, bias = model
        logits = blocks.dot("nd,dc->nc", part, weights) + bias
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        real = labels != linear.NO_LABEL
        return jnp.sum(jnp.where(real, losses, 0.0)) / jnp.sum(real)

    def shard(rows, order, targets, model):
        first = lax.axis_index(meshes.ALL_AXES) * len(rows)

        def step(carry, batch):
            model, state = carry
            numbers, labels = batch
            here = (numbers >= first) & (numbers < first + len(rows))
            part = rows[jnp.clip(numbers - first, 0, len(rows) - 1)]
            part = lax.psum(jnp.where(here[:, None], part, 0.0), meshes.ALL_AXES)
            gradient = jax.grad(loss)(model, part, labels)
            updates, state = optimizer.update(gradient, state, model)
            return (optax.apply_updates(model, updates), state), None

        (model, _), _ = lax.scan(step, (model, optimizer.init(model)), (order, targets))
        return model

    specs = (P(meshes.ALL_AXES), P(), P(), P())
    return blocks.shard_map(shard, mesh, specs, P())(rows, order, targets, start)

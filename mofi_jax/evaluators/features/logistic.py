"""Multinomial logistic regression by L-BFGS over features that lie split over the devices.

The objective is scikit-learn's: the mean loss plus |weights|^2 / (2 C n), the bias left alone.
Features of a model are far from white, so that L-BFGS on the weights themselves takes hundreds of
passes over the data.  Here it works on weights in which the ridge and a bound of the losses'
curvature, the features' covariance, are one: then a few dozen passes do, and a few where the
solution for another C is near.  The optimum is the same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from mofi_jax.distributed import sharding
from mofi_jax.evaluators.features import linear
from mofi_jax.evaluators.features.embedding import Features

MAX_STEPS = 1000  # as CLIP
GAP = 1e-5  # nats of the mean loss that are left to gain, about


class Trainer:
    """Fits one C after the other, each from the solution before."""

    def __init__(self, features: Features, classes: int, *, seed: int):
        del seed  # nothing is random
        self.features, self.classes = features, classes
        everyone = linear.labels_of(features, np.zeros(len(features), np.int32))
        sums = linear.moments(features.rows, everyone, mesh=features.mesh)
        count, total, outer = (np.asarray(part, np.float64) for part in sums)
        self.mean = total / count
        values, self.basis = np.linalg.eigh(outer / count - np.outer(self.mean, self.mean))
        self.values = np.maximum(values, 0.0)
        nothing = np.zeros((features.rows.shape[1], classes)), np.zeros(classes)
        self.solutions = {-np.inf: nothing}  # by log C

    def __call__(
        self, labels: Int32[np.ndarray, " n"], strength: float
    ) -> tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"]]:
        """Weights and bias for C = `strength`; rows labelled `linear.NO_LABEL` take no part."""
        count = int((labels != linear.NO_LABEL).sum())
        # Of two classes scikit-learn penalises the difference alone, which costs twice as much.
        l2 = (2.0 if self.classes == 2 else 1.0) / (strength * count)
        curvature = 1 / self.classes  # about p (1 - p) of a class for a blind guess
        scale = 1 / np.sqrt(curvature * self.values + l2)
        weights, bias = self._near(np.log(strength))
        start = {
            "weights": (self.basis.T @ weights) / scale[:, None],
            "bias": (bias + self.mean @ weights) * np.sqrt(curvature),
        }
        frame = {
            "map": self.basis * scale,
            "mean": self.mean,
            "bias": 1 / np.sqrt(curvature),
            "l2": l2,
            "count": count,
        }
        start, frame = jax.tree.map(np.float32, (start, frame))
        on_devices = sharding.put(self.features.mesh, (start, frame))
        target = linear.labels_of(self.features, labels)
        found = _solve(self.features.rows, target, *on_devices, mesh=self.features.mesh)
        solution = tuple(np.asarray(part, np.float64) for part in found)
        self.solutions[np.log(strength)] = solution
        return solution

    def _near(self, place: float) -> tuple[np.ndarray, np.ndarray]:
        """Between the solutions for the next smaller and larger C, on a line in log C."""
        low = max(log for log in self.solutions if log <= place)
        high = min((log for log in self.solutions if log >= place), default=low)
        share = 0.0 if high == low or np.isinf(low) else (place - low) / (high - low)
        pairs = zip(self.solutions[low], self.solutions[high], strict=True)
        return tuple((1 - share) * below + share * above for below, above in pairs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(rows, labels, weights, bias, mesh):
    return linear.log_loss(rows, labels, weights, bias, mesh=mesh)[0]


def _loss_forward(rows, labels, weights, bias, mesh):
    loss, *gradients = linear.log_loss(rows, labels, weights, bias, mesh=mesh)
    return loss, gradients


def _loss_backward(mesh, gradients, scale):
    return None, None, *(scale * gradient for gradient in gradients)


_loss.defvjp(_loss_forward, _loss_backward)


@functools.partial(jax.jit, static_argnames="mesh")
def _solve(rows, labels, start, frame, *, mesh: Mesh) -> tuple[Array, Array]:
    """Weights and bias at the optimum, from `start` in the whitened variables of `frame`."""

    def unfold(variables):
        weights = jnp.dot(frame["map"], variables["weights"], precision="highest")
        return weights, variables["bias"] * frame["bias"] - frame["mean"] @ weights

    def objective(variables):
        weights, bias = unfold(variables)
        ridge = 0.5 * frame["l2"] * jnp.sum(weights * weights)
        return _loss(rows, labels, weights, bias, mesh) / frame["count"] + ridge

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        variables, state, before, _ = carry
        value, gradient = value_and_grad(variables, state=state)
        updates, state = optimizer.update(
            gradient, state, variables, value=value, grad=gradient, value_fn=objective
        )
        return optax.apply_updates(variables, updates), state, value, before - value

    def unfinished(carry):
        _, state, value, decrease = carry
        steps, gradient = (optax.tree.get(state, name) for name in ("count", "grad"))
        # In these variables the curvature is about 1 for a blind guess, and falls with the loss:
        # half the squared gradient, divided by it, is about what is left to gain.  Below the
        # resolution of float32 there are only line searches in vain.
        gap = 0.5 * optax.tree.norm(gradient, squared=True) / jnp.minimum(value, 1.0)
        going = (gap > GAP) & (decrease > 1e-6 * value)
        return (steps == 0) | ((steps < MAX_STEPS) & going)

    carry = start, optimizer.init(start), jnp.inf, jnp.inf
    variables, *_ = jax.lax.while_loop(unfinished, step, carry)
    return jax.lax.with_sharding_constraint(unfold(variables), sharding.replicated(mesh))

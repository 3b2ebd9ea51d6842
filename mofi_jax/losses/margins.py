"""Margins: what is taken off a label's cosine, so that being right is not enough.

CosFace (arXiv 1801.09414) subtracts from the cosine, ArcFace (arXiv 1801.07698) adds to the angle.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

KINDS = ("cosface", "arcface")

# Cosines are kept off +-1, where the angle has an infinite derivative (ArcFace).
_MAX_COSINE = 1.0 - 1e-6


def margined(cos: Float[Array, "*n"], margin: float, kind: str) -> Float[Array, "*n"]:
    """The cosine (float32) of a label after the margin; a growing function of the cosine.

    The margin is in [0, 1): of the cosine (CosFace), in radians (ArcFace).
    """
    if kind == "cosface":
        return cos - margin
    inside = jnp.clip(cos, -_MAX_COSINE, _MAX_COSINE)
    moved = inside * math.cos(margin) - jnp.sqrt(1.0 - inside * inside) * math.sin(margin)
    # Beyond angle + margin = pi the cosine would rise again; from there on it falls as CosFace's.
    return jnp.where(inside > -math.cos(margin), moved, cos - margin * math.sin(margin))


def slope(cos: Float[Array, "*n"], margin: float, kind: str) -> Float[Array, "*n"] | float:
    """The derivative of `margined` by the cosine, in fewer operations than jax's own."""
    if kind == "cosface":
        return 1.0
    inside = jnp.clip(cos, -_MAX_COSINE, _MAX_COSINE)
    moved = math.cos(margin) + inside * lax.rsqrt(1.0 - inside * inside) * math.sin(margin)
    moved = jnp.where(jnp.abs(cos) > _MAX_COSINE, 0.0, moved)
    return jnp.where(inside > -math.cos(margin), moved, 1.0)

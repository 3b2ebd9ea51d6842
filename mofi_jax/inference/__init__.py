"""Trained models in use: `load` opens one, `Towers` are its functions, `Model` is both."""

from mofi_jax.inference.load import kind, load, read
from mofi_jax.inference.model import Entity, Model
from mofi_jax.inference.towers import RawPixels, Towers

__all__ = ["Entity", "Model", "RawPixels", "Towers", "kind", "load", "read"]

"""Trained models in use: `load` opens one, `Towers` are its functions, `Model` is both."""

from mofi_jax.inference.load import kind, load, read
from mofi_jax.inference.towers import Model, RawPixels, Towers

__all__ = ["Model", "RawPixels", "Towers", "load", "read"]

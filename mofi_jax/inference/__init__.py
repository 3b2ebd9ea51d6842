"""Trained models put to use; a folder of one-job files, used as ``inference.NAME``."""

from mofi_jax.inference.towers import Model, RawPixels, Towers, load, read

__all__ = ["Model", "RawPixels", "Towers", "load", "read"]

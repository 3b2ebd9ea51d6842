"""Towers as ONNX graphs, as onnxruntime and transformers.js open them."""

from mofi_jax.interop.onnx.folder import readers, write

__all__ = ["readers", "write"]

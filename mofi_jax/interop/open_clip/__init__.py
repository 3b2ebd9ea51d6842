"""open_clip folders (`local-dir:FOLDER`), both directions, and who reads them."""

from mofi_jax.interop.open_clip.folder import is_folder, read, write
from mofi_jax.interop.open_clip.readers import readers

__all__ = ["is_folder", "read", "readers", "write"]

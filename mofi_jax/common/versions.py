"""What numbers were made with."""

import contextlib
import importlib.metadata
import platform


def of(*libraries: str) -> dict[str, str]:
    """Versions of Python and of those of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in ("mofi_jax", *libraries):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a checkout
            found[name] = importlib.metadata.version(name)
    return found

"""Image embeddings from noisy web pictures, in JAX.

    import mofi_jax

    model = mofi_jax.load("runs/quickstart/export")
    model.embed_images(["cat.jpg", "dog.png"])          # float32 [2, d]
    model.name_entities("cat.jpg", k=3)                 # [[Entity(qid, name, description, score)]]

`load` opens a model, and imports what it needs when it is called; `BadInput` is raised for input
that cannot be used; `__version__` is the package's version, as text.  The command of the same
package is ``mofi`` (`mofi_jax.__main__`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mofi_jax.common.errors import BadInput

if TYPE_CHECKING:
    import os

    import jax

    from mofi_jax.inference import Model

__all__ = ("BadInput", "__version__", "load")
__version__ = "0.1.0"  # pyproject.toml reads it here, so that a checkout knows it too


def load(
    path: str | os.PathLike,
    *,
    step: str = "",
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int = 256,
) -> Model:
    """Opens a trained model: a training run, or a folder that `mofi_jax.inference.load` knows.

    Args:
      step: of a run: a saved step, "best" (config.checkpoint.keep_best), or "" for the last.
      mesh: devices of `mofi_jax.distributed.meshes.make_mesh`; all of this process without one.
      batch_size: pictures or texts on all devices at a time.

    Raises BadInput: a folder that is no model, or one that is damaged.
    """
    from mofi_jax import inference

    return inference.load(path, step=step, mesh=mesh, batch_size=batch_size)

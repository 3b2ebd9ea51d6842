"""Trees of arrays against what they should be: values that are not finite, shapes that differ."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import sharding


def check_finite(params: Any, where: epath.PathLike) -> None:
    """Raises BadInput that names the arrays with values that are not finite."""

    def finite(numbers: Any, array: Any) -> Any:
        # The extremes are NaN if any value is; isfinite of all values would take memory.
        return numbers.isfinite(array.min()) & numbers.isfinite(array.max())

    if isinstance(jax.tree.leaves(params)[0], jax.Array):
        fine = jax.jit(lambda tree: jax.tree.map(lambda x: finite(jnp, x), tree))(params)
    else:
        fine = jax.tree.map(lambda x: finite(np, x), params)
    bad = [name for name, value in sharding.named_leaves(fine).items() if not value]
    if bad:
        some = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise BadInput(
            f"{where} holds values that are not finite in {some}: nothing can be computed with "
            "them; take an earlier checkpoint, or another model."
        )


def differences(saved: Any, wanted: Any) -> dict[str, str]:
    """Arrays by name whose shapes differ between two trees, and how."""
    saved, wanted = (
        {name: tuple(leaf.shape) for name, leaf in sharding.named_leaves(tree).items()}
        for tree in (saved, wanted)
    )
    problems = {}
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved:
            problems[name] = "is not in the checkpoint"
        elif name not in wanted:
            problems[name] = "is not in the model"
        elif name.endswith("entity_table") and saved[name][1:] == wanted[name][1:]:
            pass  # padding for the mesh; the data fingerprint compares the vocabularies
        elif saved[name] != wanted[name]:
            problems[name] = f"is {saved[name]} there and {wanted[name]} here"
    return problems

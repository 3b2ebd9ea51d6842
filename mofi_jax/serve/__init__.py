"""A page in the browser for a model, on one's own machine: `python -m mofi_jax.serve`."""

"""A page for a model: drop a picture or type words, see what is near to it.

    mofi embed --model RUN --images PICTURES --out E
    mofi serve --model RUN --embeddings E        # http://127.0.0.1:8000

Without --embeddings it names entities alone.  It answers this machine only; ``--host=0.0.0.0`` lets
others in, who may then see every picture of E and ask the model, and nothing else.
"""

import importlib.util
import socket

from absl import logging

import mofi_jax
from mofi_jax.common import cli
from mofi_jax.common.errors import BadInput
from mofi_jax.inference.index import Index

_NEEDS = ("fastapi", "uvicorn")


def main(
    model: str,
    embeddings: str = "",
    images: str = "",
    step: str = "",
    host: str = "127.0.0.1",
    port: str = "8000",
) -> None:
    """Serves until it is interrupted.

    Args:
      model: a training run or an exported model.
      embeddings: what `mofi_jax.embed` has written with this model: the pictures to be found.
      images: where these pictures lie now, if they were moved.
      step: of a training run, a saved step or best; else the last.
      host, port: the address to listen at; 127.0.0.1 is for this machine alone.

    Raises BadInput: unusable model or embeddings, which do not fit each other, or a taken port.
    """
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"{' and '.join(missing)} not installed: pip install 'mofi_jax[serve]'.")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise BadInput(f"--port={port} is no port: give a number from 1 to 65535.")
    try:
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind((host, int(port)))
    except OSError as error:
        raise BadInput(
            f"Cannot listen at {host}:{port} ({error.strerror}): give another --host or --port."
        ) from error
    index = Index.open(embeddings, images=images) if embeddings else None
    # One picture at a time: a larger batch would be filled up and computed whole.
    opened = mofi_jax.load(model, step=step, batch_size=1)

    import uvicorn  # an extra

    from mofi_jax.serve import app

    # Before the first visitor: what does not fit is told, and programs are compiled.
    served = app.create(opened, index, local=host in app.LOCAL)
    logging.info("http://%s:%s  (Ctrl-C ends it)", host, port)
    uvicorn.run(served, host=host, port=int(port), log_level="warning", timeout_keep_alive=5)


if __name__ == "__main__":
    cli.run(main)

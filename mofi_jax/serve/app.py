"""The server: one page, and the questions that it asks.

Whatever comes from a visitor is a picture's bytes, a text or a row number: there is no path in any
request, so that nothing of the machine can be asked for but the pictures of the index.
"""

import os
import secrets
import threading
from collections.abc import Callable
from typing import Any

import fastapi
import numpy as np
from absl import logging
from fastapi import responses
from fastapi.concurrency import run_in_threadpool
from jaxtyping import Float32
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from mofi_jax.common.errors import BadInput
from mofi_jax.common.pages import page
from mofi_jax.data import ops
from mofi_jax.data.pictures import containers
from mofi_jax.inference import Model
from mofi_jax.inference.index import Index

LOCAL = ("127.0.0.1", "localhost", "::1")
MAX_BYTES = 20 << 20  # of a picture's file
MAX_TEXT = 2000  # characters
NEIGHBOURS, ENTITIES = 24, 5
_THUMBNAIL = 320  # pixels of the short side
_TEMPLATE = os.path.join(os.path.dirname(__file__), "page.html.j2")


def create(model: Model, index: Index | None, *, local: bool = True) -> fastapi.FastAPI:
    """The application.

    Args:
      local: answers only to the names of this machine, so that no web page that a visitor has open
        reaches it under a name of its own (DNS rebinding).

    Raises BadInput: an index of another model.
    """
    reads, names = model.towers.tokenizer is not None, model.towers.entities is not None
    gate = threading.Lock()  # the devices answer one after the other

    def look(embed: Callable[[], Float32[np.ndarray, "1 d"]], *, named: bool) -> dict[str, Any]:
        with gate:
            query = embed()
            entities = []
            if named and names:
                [entities] = model.nearest_entities(
                    query, min(ENTITIES, len(model.towers.entities))
                )
        found = []
        if index is not None:
            [rows], [cosines] = index.search(query, NEIGHBOURS)
            found = [
                {"row": row, "key": index.describe(row)["key"], "cosine": round(cosine, 4)}
                for row, cosine in zip(rows.tolist(), cosines.tolist(), strict=True)
            ]
        return {"neighbours": found, "entities": [entity._asdict() for entity in entities]}

    if index is not None:
        _check_model(model, index)
    blank = np.zeros((model.towers.image_size, model.towers.image_size, 3), np.uint8)
    look(lambda: model.embed_images([blank]), named=True)
    if reads:
        look(lambda: model.embed_texts("a"), named=False)

    app = fastapi.FastAPI(openapi_url=None)
    if local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, "[::1]"])
    nonce = secrets.token_urlsafe(16)
    whole = page.fill(
        _TEMPLATE,
        {
            "nonce": nonce,
            "model": model.description,
            "pictures": 0 if index is None else len(index),
            "entities": len(model.towers.entities) if names else 0,
            "reads": reads,
        },
    )
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
        "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
    )

    @app.middleware("http")
    async def guard(request: fastapi.Request, call: Callable) -> fastapi.Response:
        response = await call(request)
        response.headers["content-security-policy"] = policy
        response.headers["x-content-type-options"] = "nosniff"
        return response

    @app.exception_handler(BadInput)
    async def tell(request: fastapi.Request, error: BadInput) -> fastapi.Response:
        del request
        return responses.JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: fastapi.Request, error: ClientDisconnect) -> fastapi.Response:
        """Nobody reads it, and who leaves in the middle of an upload is no error of the server."""
        del request, error
        return fastapi.Response(status_code=499)

    @app.get("/")
    async def main_page() -> fastapi.Response:
        return responses.HTMLResponse(whole)

    @app.post("/search/picture")
    async def by_picture(request: fastapi.Request) -> dict[str, Any]:
        # Decoded before the gate: one visitor's large file is not what others wait for.
        rgb = await run_in_threadpool(_decode, await _body(request, MAX_BYTES))
        return await run_in_threadpool(look, lambda: model.embed_images([rgb]), named=True)

    @app.post("/search/text")
    async def by_text(request: fastapi.Request) -> dict[str, Any]:
        text = (await _body(request, 4 * MAX_TEXT)).decode("utf-8", "replace").strip()
        if not reads:
            raise BadInput("This model has no text tower: ask it with a picture.")
        if not text or len(text) > MAX_TEXT:
            raise BadInput(f"Write a text of 1 to {MAX_TEXT} characters.")
        return await run_in_threadpool(look, lambda: model.embed_texts(text), named=False)

    @app.post("/search/row/{row}")
    async def by_row(row: int) -> dict[str, Any]:
        _check(index, row)
        return await run_in_threadpool(look, lambda: index.vectors[row : row + 1], named=True)

    @app.get("/picture/{row}")
    async def picture(row: int) -> fastapi.Response:
        _check(index, row)
        jpeg = await run_in_threadpool(_thumbnail, index, row)
        return fastapi.Response(jpeg, media_type="image/jpeg")

    return app


def _check_model(model: Model, index: Index) -> None:
    try:
        known = [ops.decode_rgb(index.picture(0))] if len(index) else []
    except (ops.UndecodableImage, containers.Unreadable, OSError):
        known = []
        logging.warning("the pictures are not where they were: name their place in --images")
    if known and not index.made_by(model.embed_images(known)[0]):
        raise BadInput(
            f"{model.description} is not the model that made the embeddings: name that one in "
            "--model, or embed the pictures again."
        )


async def _body(request: fastapi.Request, most: int) -> bytes:
    """The body of a request; 413 as soon as it is larger, whatever its header says."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise fastapi.HTTPException(413, f"At most {most:,} bytes are taken.")
    return bytes(data)


def _decode(data: bytes) -> np.ndarray:
    try:
        return ops.decode_rgb(data)
    except ops.UndecodableImage as error:
        raise BadInput(f"This is no picture that can be read ({error}).") from error


def _check(index: Index | None, row: int) -> None:
    if index is None or not 0 <= row < len(index):
        raise fastapi.HTTPException(404, "There is no such picture.")


def _thumbnail(index: Index, row: int) -> bytes:
    try:
        rgb = ops.decode_rgb(index.picture(row))
    except (ops.UndecodableImage, containers.Unreadable, OSError) as error:
        raise fastapi.HTTPException(404, "The picture is gone.") from error
    size = min(_THUMBNAIL, *rgb.shape[:2])
    return ops.encode_jpeg(ops.apply(f"resize_short({size})", rgb), 88)

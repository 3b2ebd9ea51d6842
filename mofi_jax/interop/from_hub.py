"""Fetches data sets and models of the Hugging Face hub by name, with `huggingface_hub`.

    hf:OWNER/NAME   hf:OWNER/NAME@REVISION   hf:OWNER/NAME@REVISION/SUBFOLDER

or as the hub's own addresses, ``hf://datasets/OWNER/NAME`` and ``hf://OWNER/NAME``.  They are
fetched into the hub's cache once; without a network what is there is used.  Nothing that is fetched
is run as code.
"""

import functools
import glob
import os
import posixpath
import re
from typing import NamedTuple

from etils import epath

from mofi_jax.common.errors import BadInput

PREFIX = "hf:"
_ADDRESS = re.compile(
    r"hf:(?://)?(?:(?P<kind>datasets|models)/)?(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)"
    r"(?:@(?P<revision>[^/@]+))?(?:/(?P<inside>.+?)/?)?"
)
# Of models the weights of other libraries, and those that tensors alone are not sure to be.
_NOT_OURS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.onnx*")
_PICKLED = ("pytorch_model*", "open_clip_pytorch_model.bin")  # for where there is nothing else
# What the file system answers: a client's errors are OSErrors of other kinds.
_LOCAL = (OSError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)


class Snapshot(NamedTuple):
    """What was fetched."""

    path: str  # a folder, or a file of it
    revision: str  # of the commit, 40 hexadecimal digits


_FETCHED: dict[str, str] = {}


def revisions() -> dict[str, str]:
    """The commits of all that this process has fetched, by the names that it was asked for."""
    return dict(sorted(_FETCHED.items()))


def is_address(path: epath.PathLike) -> bool:
    return os.fspath(path).startswith(PREFIX)


def data(path: epath.PathLike) -> str:
    """The local path of a data set that may be one of the hub's; any other path is itself."""
    text = os.fspath(path)
    return fetch(text, "datasets").path if is_address(text) else text


def model(path: epath.PathLike) -> str:
    """The same of a model; a mistyped path is never the name of a stranger's."""
    text = os.fspath(path)
    return fetch(text, "models").path if is_address(text) else text


@functools.cache  # asked more than once, all of a process should see one revision
def fetch(text: str, kind: str) -> Snapshot:
    """Fetches a data set or model.

    Args:
      text: its address.
      kind: "datasets" or "models".

    Raises:
      BadInput: no such address, something of the other kind, or it cannot be fetched.
    """
    found = _ADDRESS.fullmatch(text)
    of_kind = found and (found["kind"] or ("models" if text.startswith("hf://") else kind))
    name, inside = (found["name"], found["inside"] or "") if found else ("", "")
    outside = inside and not {"", ".", ".."}.isdisjoint(inside.split("/"))
    if not found or of_kind != kind or outside:
        owner = "OWNER/NAME" if kind == "models" else "datasets/OWNER/NAME"
        raise BadInput(f"{text} is no address of {kind}: write hf:OWNER/NAME or hf://{owner}.")
    by_hand = f"hf download {name} --local-dir FOLDER" + " --repo-type dataset" * (
        kind == "datasets"
    )
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise BadInput(
            f"{text} needs huggingface_hub: pip install huggingface_hub, or fetch it elsewhere "
            f"(`{by_hand}`) and name its folder."
        ) from None
    options = {"repo_type": kind.removesuffix("s"), "revision": found["revision"]}
    literal = glob.escape(inside)
    if inside:
        options["allow_patterns"] = [literal, f"{literal}/*"]
    try:
        if kind == "models":
            folder = huggingface_hub.snapshot_download(name, **options, ignore_patterns=_NOT_OURS)
            files = next(os.walk(os.path.join(folder, inside)), ("", [], []))[2]
            if not any(file.endswith(".safetensors") for file in files):
                options["revision"] = _revision(folder)
                options["allow_patterns"] = [posixpath.join(literal, one) for one in _PICKLED]
                huggingface_hub.snapshot_download(name, **options)
        else:
            folder = huggingface_hub.snapshot_download(name, **options)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, errors.RevisionNotFoundError) else "name"
        raise BadInput(
            f"{text} is not among the hub's {kind}, or not for everybody: correct the {what}, or "
            "show who you are by `hf auth login`."
        ) from error
    except Exception as error:  # of its HTTP client, which changes
        if type(error) in _LOCAL and error.errno:
            at = f" at {error.filename}" if error.filename else ""
            raise BadInput(
                f"{text} cannot be kept on this machine ({os.strerror(error.errno).lower()}{at}): "
                "make room, or name another folder as HF_HOME."
            ) from error
        reason = str(error).partition("\n")[0][:150].strip(" .") or type(error).__name__
        raise BadInput(
            f"{text} cannot be fetched ({reason}): connect this machine to the network, or run "
            f"`{by_hand}` on one that is and name FOLDER."
        ) from error
    path = os.path.join(folder, inside) if inside else folder  # no slash behind it
    if not os.path.exists(path):
        raise BadInput(f"{text} has no {inside} in it: correct what is behind the name.")
    _FETCHED[text] = _revision(folder)
    return Snapshot(path, _FETCHED[text])


def _revision(folder: str) -> str:
    """The commit of a snapshot, by which the cache calls its folders."""
    return os.path.basename(os.path.normpath(folder))

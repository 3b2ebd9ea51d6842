"""A page that runs the model in the browser: pictures, the nearest words and entities.

A folder for any server of static files: index.html, the ONNX export in model/, and in vendor/
transformers.js and the runtime of ONNX that it was built with, out of their npm packages.  Nothing
is loaded from elsewhere, and no picture leaves the browser.
"""

import sys
import tarfile
from pathlib import Path

from etils import epath

from mofi_jax.common import files
from mofi_jax.common.errors import BadInput
from mofi_jax.common.pages import page
from mofi_jax.interop import huggingface, parity
from mofi_jax.interop.onnx import folder as folder_lib

# Package to version, and to the files of it that a browser needs.
PACKAGES = Path(sys.prefix) / "npm_packages"
VERSIONS = {
    "@huggingface/transformers": "4.3.2",
    # The one that this transformers.js is made for.
    "onnxruntime-web": "1.31.0-dev.20260914-8d85527a0",
}
RUNTIME = "ort-wasm-simd-threaded.asyncify"
FILES = {
    "@huggingface/transformers": ("LICENSE", "dist/transformers.min.js"),
    "onnxruntime-web": (f"dist/{RUNTIME}.mjs", f"dist/{RUNTIME}.wasm"),
}
# Bytes of a class table that the page names entities by: 32,768 of 512 numbers.
LARGEST_TABLE = 64 * 2**20
ENTITIES = "entities.json"
WORDS = ("a photo of a cat", "a photo of a dog", "a drawing of a house", "a red car")


def write(folder: epath.PathLike, clip: huggingface.Clip) -> None:
    """Writes the page with all that it needs.

    Raises BadInput: the npm packages are not there, a model without text tower, or what
      `folder.write` refuses.
    """
    folder = epath.Path(folder)
    if "text" not in clip.params:
        raise BadInput(
            "The page compares pictures with words, and this model has no text tower: export it "
            "with --format=onnx."
        )
    vendored = {}
    for package in FILES:
        vendored |= _read_package(package)
    folder_lib.write(folder / "model", clip)
    (folder / "vendor").mkdir()
    for name, data in vendored.items():
        (folder / "vendor" / name).write_bytes(data)
    table = folder / "model" / huggingface.ENTITY_TABLE_FILE
    named = table.exists() and table.stat().length <= LARGEST_TABLE
    if named:
        known = clip.entities
        words = [known.text(i, with_description=True) for i in range(len(known))]
        files.write_json(folder / ENTITIES, words)
    values = folder_lib.transformers_js(clip.config) | {
        "words": WORDS,
        "runtime": RUNTIME,
        "entities": {"names": ENTITIES, "table": f"model/{table.name}"} if named else None,
    }
    template = str(Path(__file__).parent / "web.html.j2")
    (folder / "index.html").write_text(page.fill(template, values))


def _read_package(package: str) -> dict[str, bytes]:
    version = VERSIONS[package]
    path = PACKAGES / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    wanted = " ".join(f"{name}@{VERSIONS[name]}" for name in VERSIONS)
    remedy = f"run `mkdir -p {PACKAGES} && npm pack --pack-destination {PACKAGES} {wanted}`"
    found = {}
    try:
        with tarfile.open(path) as packed:
            for name in FILES[package]:
                found[Path(name).name] = packed.extractfile(f"package/{name}").read()
    except (OSError, KeyError, tarfile.TarError, EOFError) as error:
        raise BadInput(
            f"The page takes {package} {version} from {path}, which cannot be read ({error}): "
            f"{remedy}."
        ) from error
    return found


def readers(folder: epath.PathLike) -> dict[str, parity.Reader]:
    """Who opens the model of the page."""
    return folder_lib.readers(epath.Path(folder) / "model")

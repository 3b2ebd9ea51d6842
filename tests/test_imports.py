"""What imports what: floors of the house, no TensorFlow, no jax where workers run."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent
PACKAGES = ("mofi_jax", "data_prep", "configs")
MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for package in PACKAGES
    for path in (REPOSITORY / package).rglob("*.py")
    if path.name != "__init__.py"
)

# From the ground up: a module uses only its own floor and those below it.
FLOORS = (
    ("common", "distributed"),
    ("data", "interop", "losses", "model", "telemetry"),
    ("evaluators", "inference", "training"),
    (
        *(
            "curves",
            "doctor",
            "embed",
            "evaluate",
            "export",
            "grow",
            "interpolate",
            "make_eval_sets",
        ),
        *("plan", "search", "serve", "sweep", "train", "__main__"),
    ),
)

# Modules whose libraries are an extra, imported by mains that say so where it is missing.
OF_EXTRAS = {"mofi_jax.serve.app": "fastapi"}

# In the order in which data flows; the mains come last.
DATA_FLOORS = (
    ("engine",),
    ("pairs", "kb"),
    ("linking",),
    ("selection",),
    ("filters",),
    ("dataset",),
    ("card", "quality"),
    ("build_anchors", "build_i2e", "build_kb", "class_folders", "label_quality", "remove_keys"),
)
HOUSES = {"mofi_jax": FLOORS, "data_prep": DATA_FLOORS}


def room(module):
    return module.split(".")[1]


def floor(module):
    floors = HOUSES[module.partition(".")[0]]
    [level] = [i for i, rooms in enumerate(floors) if room(module) in rooms]
    return level


def imported(module):
    tree = ast.parse((REPOSITORY / (module.replace(".", "/") + ".py")).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("house", HOUSES)
def test_a_room_uses_only_what_lies_below_and_none_in_a_circle(house):
    above = {"mofi_jax": ("data_prep", "configs"), "data_prep": ("configs",)}[house]
    uses = {}
    for module in (m for m in MODULES if m.startswith(f"{house}.")):
        for name in imported(module):
            assert not name.startswith(above), f"{module} imports {name}"
            if name.startswith(f"{house}.") and room(name) != room(module):
                assert floor(name) <= floor(module), f"{module} imports {name}"
                uses.setdefault(room(module), set()).add(room(name))
    graphlib.TopologicalSorter(uses).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("house", HOUSES)
def test_the_house_stays_small_enough_to_find_ones_way(house):
    folder = REPOSITORY / house
    entries = [path for path in folder.iterdir() if not path.name.startswith("__")]
    assert len([path for path in entries if path.suffix == ".py"]) <= 9
    assert len([path for path in entries if path.is_dir()]) <= 14
    for path in folder.rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path} has {lines} lines"
        assert len(list(path.parent.glob("*.py"))) <= 12, path.parent


def test_tables_are_read_where_file_names_are_no_patterns():
    """`engine.read_table`, `ask` and `listed`: the libraries' own ways take names for patterns."""
    for module in (m for m in MODULES if m.startswith("data_prep.")):
        if module == "data_prep.engine.relational":
            continue
        source = (REPOSITORY / (module.replace(".", "/") + ".py")).read_text()
        assert not re.search(r"pq\.read_table\(|connection\.sql\(f?\W*SELECT|\.glob\(", source) or (
            module == "data_prep.pairs.files"  # `config.sources` are patterns
        ), module


def test_no_foreign_framework_and_no_private_module():
    for module in MODULES:
        for name in imported(module):
            # Formats of others are compared by their own readers, where these are installed.
            exports = module.startswith("mofi_jax.interop.")
            allowed = ("torch", "transformers") if exports else ()
            root = name.partition(".")[0]
            assert root not in {"tensorflow", "torch", "transformers"} - set(allowed), module
            assert "orbax.checkpoint._src" not in name, module


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def test_import_every_module_without_tensorflow_or_torch():
    # None in sys.modules makes an import fail, as on a machine where the core alone is installed.
    names = [name for name in MODULES if name not in OF_EXTRAS]
    code = f"""
import importlib, sys
absent = ("tensorflow", "torch", "transformers", *{[*OF_EXTRAS.values()]})
sys.modules.update(dict.fromkeys(absent))
for name in {names}:
    importlib.import_module(name)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_import_of_the_step_needs_no_data_libraries():
    """model/, losses/, training/ run on a machine that has jax, flax, optax and orbax alone."""
    code = """
import sys
from mofi_jax.training import cadence, optim, state, step
from mofi_jax.losses import contrastive, entity
heavy = {"grain", "tensorflow_datasets", "array_record", "spacy", "duckdb", "pyarrow", "cv2"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_import_of_data_workers_leaves_jax_alone():
    code = """
import sys
from mofi_jax.data import ops, records, tokenizer
assert "jax" not in sys.modules
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_only_the_measuring_code_knows_of_the_truth():
    for module in MODULES:
        source = (REPOSITORY / (module.replace(".", "/") + ".py")).read_text()
        measures = module.startswith(
            ("data_prep.label_quality", "data_prep.quality.", "configs.claim")
        )
        assert measures or "truth.jsonl" not in source, module


def test_import_of_the_step_benchmark_needs_jax_flax_and_optax_alone():
    """It runs on GPU machines where neither the data libraries nor ml_collections are."""
    code = """
import sys
absent = ("grain", "array_record", "ml_collections", "tensorflow_datasets", "spacy", "tensorflow")
absent += ("duckdb", "pyarrow", "cv2", "torch", "timm", "transformers", "orbax")
sys.modules.update(dict.fromkeys(absent))
from benchmarks import attention_case, step_case, train_step
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr

"""What imports what: floors of the house, no TensorFlow, no jax where workers run."""

import ast
import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parent.parent
PACKAGES = ("mofi_jax", "data_prep", "configs")
MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for package in PACKAGES
    for path in (REPOSITORY / package).rglob("*.py")
    if path.name != "__init__.py"
)

# From the ground up; a room uses only what lies below it.
FLOORS = (
    ("errors",),
    (
        "partition",
        "hosts",
        "preemption",
        "paths",
        "json_files",
        "telemetry",
        "data.augment",
        "data.limits",
        "data.metadata",
        "data.ops",
        "data.records",
        "data.tokenizer",
        "cli",
    ),
    ("accelerators", "hlo", "program_costs", "tpu_topology"),
    ("model",),
    ("losses",),
    ("data.pipeline", "data.prefetch", "data.training_set"),
    ("interop", "model_file"),
    ("training",),
    ("inference", "flops"),
    ("run_folder", "run_lock", "warm_start"),
    ("evaluators",),
    ("machine", "sweep_table"),
    ("train", "evaluate", "export", "grow", "doctor", "sweep", "curves", "plan"),
)


def floor(module):
    name = module.removeprefix("mofi_jax.")
    [level] = [
        i for i, names in enumerate(FLOORS) for n in names if name == n or name.startswith(f"{n}.")
    ]
    return level


def imported(module):
    tree = ast.parse((REPOSITORY / (module.replace(".", "/") + ".py")).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_room_uses_only_what_lies_below():
    for module in (m for m in MODULES if m.startswith("mofi_jax.")):
        for name in imported(module):
            assert not name.startswith(("data_prep", "configs")), f"{module} imports {name}"
            known = next((m for m in MODULES if name == m or name.startswith(f"{m}.")), None)
            if known and known.startswith("mofi_jax.") and known != module:
                assert floor(known) <= floor(module), f"{module} imports {known}"


def test_no_foreign_framework_and_no_private_module():
    for module in MODULES:
        for name in imported(module):
            # export.py asks whether torch and transformers are there, and compares if so.
            allowed = ("torch", "transformers") if module == "mofi_jax.export" else ()
            root = name.partition(".")[0]
            assert root not in {"tensorflow", "torch", "transformers"} - set(allowed), module
            assert "orbax.checkpoint._src" not in name, module


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def test_import_every_module_without_tensorflow_or_torch():
    # None in sys.modules makes an import fail, as on a machine where the core alone is installed.
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys(("tensorflow", "torch", "transformers")))
for name in {MODULES}:
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
        assert module == "data_prep.label_quality" or "truth.jsonl" not in source, module


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

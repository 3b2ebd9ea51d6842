"""What a machine must have before a training may count on it, in single checks.

Knows nothing of models or data.  Sentences of problems end in their remedy, as those of `BadInput`
do.  Devices are looked at in a process of their own (``python -m mofi_jax.doctor.machine``): a
start that hangs must not hang the doctor, and a TPU belongs to the process that has opened it.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from packaging import requirements

from mofi_jax.common.errors import BadInput
from mofi_jax.distributed import hosts, meshes
from mofi_jax.telemetry import accelerators

# What links jax to a device; jax says in its extras which version of each it needs.
PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
# Seconds that a start may take after all processes have come: compiling nothing, opening devices.
DEVICE_TIMEOUT = 180


class Report:
    """Collects (name, level, text) of each check; levels are ok, warning and problem."""

    def __init__(self) -> None:
        self.checks: list[tuple[str, str, str]] = []

    def add(self, name: str, level: str, text: str) -> None:
        self.checks.append((name, level, " ".join(text.split())))

    @contextlib.contextmanager
    def about(self, name: str, where: str = "") -> Iterator[None]:
        """A `BadInput` inside the block is a problem, in its own sentence."""
        try:
            yield
        except BadInput as error:
            self.add(name, "problem", f"{where}{error}")


def versions(report: Report, wanted: Sequence[str]) -> None:
    """Installed packages against requirement lines such as ``jax>=0.10  # why``."""
    lines = [line.partition("#")[0].strip() for line in wanted]
    needed = [requirements.Requirement(line) for line in lines if line and line[0] != "-"]
    needed = [r for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
    extras = map(requirements.Requirement, importlib.metadata.requires("jax") or [])
    needed += [r for r in extras if r.name in PLUGINS and installed(r.name)]
    wrong = dict.fromkeys(
        f"{r.name}{r.specifier} is needed, {installed(r.name) or 'none'} is installed"
        for r in needed
        if not r.specifier.contains(installed(r.name) or "0", prereleases=True)
    )
    if wrong:
        remedy = 'run pip install -r requirements.txt, and pip install -U "jax[tpu]" (or cuda13)'
        report.add("packages", "problem", f"{'; '.join(wrong)}: {remedy} on all hosts.")
    else:
        python = ".".join(map(str, sys.version_info[:3]))
        report.add("packages", "ok", f"Python {python}, jax {installed('jax')}, all as required")


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices(report: Report, **options: Any) -> dict[str, Any] | None:
    """Starts jax as a training would, in a process of its own.

    Args:
      options: distributed, coordinator, processes, process, timeout (`hosts.start`) and mesh.

    Returns:
      See `_devices`; None where jax does not start, which is reported.
    """
    limit = DEVICE_TIMEOUT + (options["timeout"] if options["distributed"] else 0)
    command = [sys.executable, "-m", "mofi_jax.doctor.machine"]
    pipes = {"input": json.dumps(options), "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, **pipes, timeout=limit, check=False)
        found = json.loads(done.stdout.strip().rpartition("\n")[2])
    except subprocess.TimeoutExpired:
        found = {
            "problem": f"jax found no devices within {limit} s: start all hosts of the slice (a "
            "TPU waits for the others: set --config.distributed=True), open the ports 8476 and "
            "8482 in the firewall, and end whatever holds the device."
        }
    except ValueError:
        last = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        found = {"problem": f"jax does not start ({last[:300]}): see its documentation."}
    if "problem" in found:
        report.add("devices", "problem", found["problem"])
        return None
    axes = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    kinds = f"{found['devices']} x {found['kind']} ({found['platform']})"
    hosts_here = f"{found['processes']} hosts, {found['local']} here"
    report.add("devices", "ok", f"{kinds} on {hosts_here}; mesh {axes}")
    return found


def _devices(options: Mapping[str, Any]) -> dict[str, Any]:
    """The devices and the mesh, or {"problem": sentence}; in the process that may hang."""
    mesh_options = options.pop("mesh")
    try:
        hosts.start(**options)
        mesh = meshes.make_mesh(**mesh_options)
    except BadInput as error:
        return {"problem": str(error)}
    device = jax.local_devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "devices": jax.device_count(),
        "local": jax.local_device_count(),
        "processes": jax.process_count(),
        "memory": accelerators.memory_of(device),
        "slices": meshes.count_slices(jax.devices()),
        "mesh": dict(mesh.shape),  # sizes by axis
    }


def unseen(report: Report, root: str = "/") -> None:
    """Accelerators of this machine, where jax sees the CPU alone."""
    # /dev/vfio is also other devices', so it counts with libtpu alone.
    patterns = ("nvidia[0-9]*", "accel[0-9]*", *["vfio/[0-9]*"] * bool(installed("libtpu")))
    found = [path for p in patterns for path in pathlib.Path(root, "dev").glob(p)]
    if found:
        plugins = ", ".join(f"{name} {installed(name)}" for name in PLUGINS if installed(name))
        text = (
            f"jax sees the CPU alone, but there is {found[0]} (installed: {plugins or 'no plugin'})"
            ': unset JAX_PLATFORMS, run pip install "jax[cuda13]" (jax[cuda12] with a driver below '
            '580) or "jax[tpu]", and see whether nvidia-smi works.'
        )
        report.add("devices", "problem", text)


def holders(report: Report, root: str = "/") -> None:
    """Processes that hold a TPU or a GPU; before jax takes it."""
    held: dict[str, str] = {}
    for link in pathlib.Path(root, "proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # another user's, or gone by now
            if re.search(r"/dev/(accel|vfio/|nvidia)\d+$", os.readlink(link)):
                held.setdefault(link.parts[-3], os.readlink(link))
    for process, device in held.items():
        report.add("leftover", "warning", f"process {process} holds {device}: end it if it trains.")


def folder(report: Report, path: pathlib.Path) -> pathlib.Path | None:
    """The workdir, or what exists above it, if checkpoints can be committed there, else None."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    step = "making a folder"
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as scratch:
            part = pathlib.Path(scratch, "part")
            part.mkdir()
            step = "writing and syncing a file"
            with open(part / "file", "wb", buffering=0) as file:
                file.write(b"x" * 4096)
                os.fsync(file.fileno())
            step = "replacing a file"
            (part / "other").write_bytes(b"y")
            os.replace(part / "other", part / "file")
            step = "renaming a folder with files in it"
            os.rename(part, pathlib.Path(scratch, "whole"))
    except OSError as error:
        text = (
            f"{place}: {step} fails ({error.strerror}): name another folder, or mount the bucket "
            "with gcsfuse --rename-dir-limit 200000 (or a hierarchical namespace)."
        )
        report.add("workdir", "problem", text)
        return None
    report.add("workdir", "ok", f"{path} can be written")
    return place


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    print(json.dumps(_devices(json.load(sys.stdin))))

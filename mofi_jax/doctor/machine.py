"""What a machine must have before a training may count on it, in single checks.

Knows nothing of models or data: numbers come in, a `Report` is filled.  Sentences of problems end
in their remedy, as those of `BadInput` do.  Devices are looked at in a process of their own
(``python -m mofi_jax.doctor.machine``), since a start that hangs must not hang who asks, and a TPU
belongs to the process that has looked at it.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import psutil
from absl import flags
from packaging import requirements, version

from mofi_jax.common.errors import BadInput
from mofi_jax.data import limits
from mofi_jax.distributed import hosts, meshes

OLDEST_PYTHON = (3, 11)
# What links jax to a device; jax says which version of each it needs.
PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
# Seconds that a start may take after all processes have come: compiling nothing, opening devices.
DEVICE_TIMEOUT = 180
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is (ok, warning, problem), and the remedy."""

    name: str
    level: str
    text: str


class Report:
    """Collects checks; a `BadInput` inside ``about`` is a problem, told by its own sentence."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def ok(self, name: str, text: str) -> None:
        self.checks.append(Check(name, "ok", text))

    def warning(self, name: str, text: str) -> None:
        self.checks.append(Check(name, "warning", text))

    def problem(self, name: str, text: str) -> None:
        self.checks.append(Check(name, "problem", text))

    @contextlib.contextmanager
    def about(self, name: str, where: str = "") -> Iterator[None]:
        try:
            yield
        except BadInput as error:
            self.problem(name, where + " ".join(str(error).split()))

    @property
    def problems(self) -> list[Check]:
        return [check for check in self.checks if check.level == "problem"]


# ------------------------------------------------------------------------- versions


def versions(report: Report, wanted: Sequence[str]) -> None:
    """Python and packages against requirement lines such as ``jax>=0.10  # why``."""
    python = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        report.problem("python", f"Python {python} is too old: use 3.11 or newer.")
    else:
        report.ok("python", f"Python {python}")
    lines = [line.partition("#")[0].strip() for line in wanted]
    wrong, seen = [], 0
    for line in lines:
        if not line or line.startswith("-"):
            continue
        requirement = requirements.Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        seen += 1
        found = installed(requirement.name)
        if found is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, not {requirement.specifier}")
    if wrong:
        report.problem("packages", f"{'; '.join(wrong)}: run pip install -r requirements.txt.")
    else:
        report.ok("packages", f"{seen} in their ranges, jax {installed('jax')}")
    plugins(report, importlib.metadata.requires("jax") or [])


def plugins(report: Report, of_jax: Sequence[str]) -> None:
    """The plugins that are installed against what this jax asks of them in its extras."""
    for name in PLUGINS:
        found = installed(name)
        if found is None:
            continue
        asked = [
            requirement.specifier
            for requirement in map(requirements.Requirement, of_jax)
            if requirement.name == name and requirement.marker is not None
        ]
        if asked and not any(specifier.contains(found, prereleases=True) for specifier in asked):
            extra = "tpu" if name == "libtpu" else name.split("-")[1]
            report.problem(
                "plugin",
                f"{name} {found} does not belong to jax {installed('jax')}, which asks for "
                f'{asked[0]}: run pip install -U "jax[{extra}]", on all hosts.',
            )
        else:
            report.ok("plugin", f"{name} {found}")


def installed(name: str) -> str | None:
    try:
        return str(version.Version(importlib.metadata.version(name)))
    except (importlib.metadata.PackageNotFoundError, version.InvalidVersion):
        return None


# ------------------------------------------------------------------------- devices


def look(report: Report, **options: Any) -> dict[str, Any] | None:
    """Starts jax as a training would, in a process of its own.

    Args:
      options: distributed, coordinator, processes, process, timeout (`hosts.start`) and mesh.

    Returns:
      {"platform", "kind", "devices", "local", "processes", "memory": bytes a device or None,
      "mesh": sizes by axis}; None where jax does not start, which is reported.
    """
    limit = DEVICE_TIMEOUT + (options["timeout"] if options["distributed"] else 0)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mofi_jax.doctor.machine"],
            input=json.dumps(options),
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        report.problem(
            "devices",
            f"jax found no devices within {limit} s: start all hosts of the slice (a TPU waits for "
            "the others: set --config.distributed=True), let the ports 8476 and 8482 through the "
            "firewall, and end whatever holds the device.",
        )
        return None
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        report.problem(
            "devices", f"jax does not start ({last.strip()[:300]}): see its documentation."
        )
        return None
    if "problem" in found:
        report.problem("devices", found["problem"])
        return None
    each = f", {found['memory'] / GIB:.0f} GiB each" if found["memory"] else ""
    axes = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    report.ok(
        "devices",
        f"{found['devices']} x {found['kind']} ({found['platform']}{each}) on "
        f"{found['processes']} hosts, {found['local']} here; mesh {axes}",
    )
    return found


def _look(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `look` returns, or {"problem": sentence}; in the process that may hang."""
    try:
        hosts.start(
            options["distributed"],
            coordinator=options["coordinator"],
            processes=options["processes"],
            process=options["process"],
            timeout=options["timeout"],
        )
        mesh = meshes.make_mesh(**options["mesh"])
    except BadInput as error:
        return {"problem": " ".join(str(error).split())}
    device = jax.local_devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "devices": jax.device_count(),
        "local": jax.local_device_count(),
        "processes": jax.process_count(),
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "mesh": dict(mesh.shape),
    }


def gpus(report: Report, platform: str | None) -> None:
    """GPUs that the driver shows against what jax has found (None: it has found nothing)."""
    if shutil.which("nvidia-smi") is None:
        return
    query = "--query-gpu=name,driver_version,memory.used"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    if done.returncode or not rows:
        report.problem("gpu", f"nvidia-smi fails ({done.stdout.strip()[:200]}): mend the driver.")
        return
    name, driver = rows[0][:2]
    if platform == "cpu":
        plugin = next((p for p in PLUGINS[1:] if installed(p)), None)
        remedy = (
            f"{plugin} is there: see what jax says with JAX_PLATFORMS=cuda, and whether driver "
            f"{driver} is new enough for it"
            if plugin
            else 'run pip install "jax[cuda13]" (or cuda12 with a driver below 580)'
        )
        report.problem(
            "gpu", f"there are {len(rows)} x {name}, but jax sees the CPU alone: {remedy}."
        )
        return
    report.ok("gpu", f"{len(rows)} x {name}, driver {driver}")


def gpu_memory_in_use(report: Report) -> None:
    """Memory of GPUs that others hold; before jax takes its own."""
    if shutil.which("nvidia-smi") is None:
        return
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [line.split(", ") for line in done.stdout.strip().splitlines() if ", " in line]
    held = [(i, int(used)) for i, used in rows if used.isdecimal() and int(used) > 1024]
    if held:
        some = ", ".join(f"GPU {i} {used} MiB" for i, used in held)
        report.warning(
            "gpu memory", f"in use already ({some}): end what is left over, see nvidia-smi."
        )


def tpus(report: Report, platform: str | None, root: str = "/") -> None:
    """A TPU in the machine against libtpu and what jax has found."""
    found = tpu_files(root)
    if platform != "tpu" and not found:
        return
    if installed("libtpu") is None:
        report.problem(
            "tpu", f'there is a TPU ({found[0]}) but no libtpu: run pip install "jax[tpu]".'
        )
    elif platform == "cpu":
        report.problem(
            "tpu",
            f"there is a TPU ({found[0]}), but jax sees the CPU alone: unset JAX_PLATFORMS, and "
            "end whatever holds the TPU.",
        )
    else:
        report.ok("tpu", f"libtpu {installed('libtpu')}")


def tpu_files(root: str = "/") -> list[str]:
    """Device files of TPUs; /dev/vfio is also other devices', so it counts with libtpu alone."""
    device = pathlib.Path(root, "dev")
    files = sorted(device.glob("accel[0-9]*"))
    if installed("libtpu") is not None:
        files += sorted(device.glob("vfio/[0-9]*"))
    return [str(path) for path in files]


def leftovers(report: Report, root: str = "/") -> None:
    """Processes that hold a TPU, and libtpu's lock; before jax takes both."""
    found = False
    for link in pathlib.Path(root, "proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:  # another user's, or gone by now
            continue
        pid = link.parent.parent.name
        if re.search(r"/dev/(accel|vfio/)\d+$", target) and pid != str(os.getpid()):
            found = True
            report.problem("leftover", f"process {pid} holds {target}: end it.")
            break
    lock = pathlib.Path(root, "tmp/libtpu_lockfile")
    if found or not lock.exists():
        return
    try:
        with open(lock, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError:
        report.problem("leftover", f"{lock} belongs to another user: remove it (sudo rm {lock}).")
    except BlockingIOError:
        report.problem("leftover", f"{lock} is locked: end the process that uses the TPU.")


# ------------------------------------------------------------------------- memory, files


def memory(report: Report, needed: float, what: str, cgroup: str = "/sys/fs/cgroup") -> None:
    """Free memory of the host, or of its container, against bytes that will be needed."""
    free = float(psutil.virtual_memory().available)
    try:
        limit = float(pathlib.Path(cgroup, "memory.max").read_text())
        free = min(free, limit - float(pathlib.Path(cgroup, "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or one without limit ("max")
        pass
    text = f"about {needed / GIB:.1f} GiB of {free / GIB:.1f} GiB free ({what})"
    remedy = "fewer config.data.workers, or a smaller batch a host"
    if needed > free:
        report.problem("host memory", f"{text} will be needed: {remedy}.")
    elif needed > 0.8 * free:
        report.warning("host memory", f"{text} will be needed, which is tight: {remedy}.")
    else:
        report.ok("host memory", text)


def descriptors(report: Report, shards: int) -> None:
    """Whether a process may hold all shards open at once."""
    with report.about("open files"):
        limit = limits.allow_open_files(shards)
        report.ok("open files", f"{shards} shards and {limits.OTHER_FILES} others of {limit}")


def folder(report: Report, name: str, path: pathlib.Path) -> pathlib.Path | None:
    """Whether checkpoints can be committed in a folder, which is left as it was.

    Returns:
      The folder, or the nearest one above it that exists; None if nothing can be written there.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    step = "making a folder"
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as scratch:
            part, whole = pathlib.Path(scratch, "part"), pathlib.Path(scratch, "whole")
            part.mkdir()
            step = "writing and syncing a file"
            with open(part / "file", "wb") as file:
                file.write(b"x" * 4096)
                file.flush()
                os.fsync(file.fileno())
            step = "replacing a file"
            (part / "other").write_bytes(b"y")
            os.replace(part / "other", part / "file")
            step = "renaming a folder with files in it"
            os.rename(part, whole)
            if (whole / "file").read_bytes() != b"y":
                raise OSError("a file that was replaced still has its old content")
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = (
            "mount the bucket with gcsfuse --rename-dir-limit 200000, or use one with hierarchical "
            "namespace"
            if step.startswith("renaming")
            else "name a folder that may be written, on a disk with room"
        )
        report.problem(name, f"{place}: {step} fails ({reason}): {remedy}.")
        return None
    report.ok(name, f"{path} can be written" + ("" if place == path.absolute() else ", and made"))
    return place


def space(report: Report, place: pathlib.Path, needed: int, there: int, what: str) -> None:
    """Free disk against bytes to be written, of which some are there and will be replaced."""
    free = shutil.disk_usage(place).free + there
    text = f"{needed / GIB:.2f} GiB for {what}, {free / GIB:.1f} GiB free or to be replaced"
    if needed > free:
        report.problem("disk", f"{text}: make room, or lower config.checkpoint.keep.")
    elif needed > 0.8 * free:
        report.warning("disk", f"{text}, which is tight: make room.")
    else:
        report.ok("disk", text)


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    print(json.dumps(_look(json.load(sys.stdin))))

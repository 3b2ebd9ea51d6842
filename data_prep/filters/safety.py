"""Safety: pairs that may not be published. pairs/, embeddings/ -> unsafe/.

    unsafe/   NNNNN.parquet  key, reason: the first that holds of

        blocked_hash         the sha256 of the picture is on the list
        blocked_domain       the host of the url is on the list, or a subdomain of one that is
        unsafe_column:NAME   an input column is above its limit, or holds a value that is rejected
        unsafe_score         the head's score of the CLIP embedding is above the threshold

A column that a pair lacks, a url without host and a picture without embedding (it has no candidate
and so no label) say nothing against a pair; the former two are counted.
"""

import functools
import importlib
import importlib.util
import json
import math
import re
import sys
import urllib.parse
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np
from jaxtyping import Float

from data_prep import engine
from data_prep.selection import embed
from mofi_jax.common import errors

HEAD_FILES = (".npz", ".safetensors")

_AUTHORITY = re.compile(r"(?:(?:[A-Za-z][A-Za-z0-9+.-]*:)?//)?([^/?#\\]*)")
_MAX_HOST = 253  # characters; DNS knows no longer name, and IDNA takes the square of them

Head = Callable[[Float[np.ndarray, "n d"]], Float[np.ndarray, " n"]]


def is_on(safety: ml_collections.ConfigDict) -> bool:
    """Whether any rule is set."""
    return any(safety[name] for name in ("head", "columns", "blocked_domains", "blocked_hashes"))


def check(safety: ml_collections.ConfigDict) -> None:
    """Reads all that the rules name.

    Raises:
      BadInput: a file that is missing or not what it should be, a rule that no value can meet.
    """
    where = "config.filters.safety"
    if safety.head:
        load_head(safety.head)
        if not 0 <= safety.threshold <= 1:
            raise errors.BadInput(f"{where}.threshold={safety.threshold}: give 0 to 1.")
    for name, rule in safety.columns.items():
        number = isinstance(rule, int | float) and not isinstance(rule, bool)
        values = isinstance(rule, list | tuple) and rule and all(isinstance(v, str) for v in rule)
        if not values and not (number and math.isfinite(rule)):
            raise errors.BadInput(
                f"{where}.columns.{name}={rule!r}: give a number, above which pairs are rejected,"
                " or a list of the strings that are."
            )
    if safety.blocked_domains:
        read_domains(safety.blocked_domains)
    if safety.blocked_hashes:
        read_hashes(safety.blocked_hashes)


def run(config: ml_collections.ConfigDict, work: engine.Engine, shards: Sequence[str]) -> None:
    """Writes unsafe/.

    Args:
      config: `filters.safety`: `head`, a linear head (.npz or .safetensors with `weight` [d] and
        `bias`; its score is the sigmoid) or "module:function" from float32 [n, d] to scores [n] in
        0..1; `threshold`, the highest score that stays; `columns`, of an input column the highest
        number that stays, or the strings that go; `blocked_domains`, `blocked_hashes`, files.
      work: the engine; its work directory holds pairs/ and, for a head, embeddings/.
      shards: names of the shards to look at.

    Raises:
      BadInput: see `check`; a head that does not fit the embeddings; a column that no pair has.
    """
    safety, workdir = config.filters.safety, work.workdir
    settings = {name: safety[name] for name in ("blocked_domains", "blocked_hashes")}
    settings |= {"version": 2, "columns": safety.columns.to_dict(), "head": safety.head}
    settings |= {"threshold": safety.threshold} if safety.head else {}
    files = [safety[name] for name in ("blocked_domains", "blocked_hashes") if safety[name]]
    files += [_file_of(safety.head)] if safety.head else []
    tasks = []
    for shard in shards:
        keys = workdir / f"embeddings/{shard}.parquet"
        embedded = (keys, keys.with_suffix(".npy")) if safety.head else ()
        tasks.append(engine.Task(shard, (workdir / f"pairs/{shard}.parquet", *embedded, *files)))
    counts = engine.total_counts(work.map_shards("unsafe", _judge, tasks, settings))
    for name in safety.columns:
        if counts["pairs"] and counts[f"without_column:{name}"] == counts["pairs"]:
            raise errors.BadInput(
                f"config.filters.safety.columns.{name}: no pair has a value of this kind in the"
                " column: check its name and type, and that it is among the columns kept of the"
                " input."
            )


def _judge(task: engine.Task, outputs: engine.Outputs, settings: dict) -> dict[str, int]:
    columns = ["key", *(["sha256"] if settings["blocked_hashes"] else [])]
    columns += ["url"] if settings["blocked_domains"] else []
    columns += ["extras"] if settings["columns"] else []
    pairs = engine.read_table(task.inputs[0], columns=columns).to_pydict()
    keys, found = pairs["key"], {}
    counts = {"pairs": len(keys)}
    if settings["blocked_hashes"]:
        hashes = _hashes([settings["blocked_hashes"]])
        for key, digest in zip(keys, pairs["sha256"], strict=True):
            if digest in hashes:
                found.setdefault(key, "blocked_hash")
    if settings["blocked_domains"]:
        domains = _domains([settings["blocked_domains"]])
        counts["without_host"] = 0
        for key, url in zip(keys, pairs["url"], strict=True):
            host = host_of(url or "")
            counts["without_host"] += not host
            if is_blocked(host, domains):
                found.setdefault(key, "blocked_domain")
    counts |= {f"without_column:{name}": 0 for name in settings["columns"]}
    for key, text in zip(keys, pairs.get("extras", []), strict=False):
        extras = json.loads(text) if text else {}
        for name, rule in settings["columns"].items():
            verdict = is_rejected(extras.get(name), rule)
            counts[f"without_column:{name}"] += verdict is None
            if verdict:
                found.setdefault(key, f"unsafe_column:{name}")
    if settings["head"]:
        embedded = engine.read_table(task.inputs[1], columns=["key"])["key"].to_pylist()
        embeddings = np.load(task.inputs[2])
        if len(embedded):
            scores = load_head(settings["head"])(embeddings.astype(np.float32))
            # Rounded as all scores are before they meet a threshold.
            unsafe = np.round(scores, embed.DECIMALS) > settings["threshold"]
            for row in np.flatnonzero(unsafe):
                found.setdefault(embedded[row], "unsafe_score")
    rows = [(key, found[key]) for key in keys if key in found]
    table = engine.rejects_table(outputs.stage, rows).drop_columns("stage")
    outputs.write_table(f"unsafe/{task.name}.parquet", table)
    for _, reason in rows:
        counts[reason] = counts.get(reason, 0) + 1
    return counts


@engine.kept
def _domains(files: Sequence[str]) -> frozenset[str]:
    return read_domains(*files)


@engine.kept
def _hashes(files: Sequence[str]) -> frozenset[str]:
    return read_hashes(*files)


# ------------------------------------------------------------------------------------------ columns


def is_rejected(value: object, rule: float | Sequence[str]) -> bool | None:
    """Whether a value breaks the rule: a number, the highest that stays, or strings, which go.

    Strings are compared without regard to case. None: there is no value that the rule speaks of; a
    number may be written as a string.
    """
    if isinstance(rule, int | float):
        try:
            number = float(value) if isinstance(value, int | float | str) else math.nan
        except (ValueError, OverflowError):
            return None
        return None if math.isnan(number) else number > rule
    if isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return None
    return value.strip().casefold() in {text.strip().casefold() for text in rule}


# ------------------------------------------------------------------------------------------ domains


def read_domains(path: str) -> frozenset[str]:
    """The domains of a list, a line each, as `host_of` writes them; `#` starts a comment.

    Raises:
      BadInput: no such file, or a line that is no domain.
    """
    domains = set()
    for number, line in _lines(path, "blocked_domains"):
        text = line.partition("#")[0].strip().removeprefix("*.")
        if not text:
            continue
        domain = _ascii(text)
        if not domain or not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", domain):
            raise errors.BadInput(
                f"config.filters.safety.blocked_domains: line {number} of {path} is no domain:"
                f" {line.strip()!r}; write one in each line, such as example.org."
            )
        domains.add(domain)
    return frozenset(domains)


def host_of(url: str) -> str:
    """The host of a url in lower case, international names in ASCII, "" where there is none.

    A url without "scheme://" counts as one that starts with its host.
    """
    # Four times as fast as urllib.parse, which also checks what does not matter here.
    host = _AUTHORITY.match(url.strip())[1].rpartition("@")[2]
    if host.startswith("["):
        host = host[1:].partition("]")[0] if "]" in host else ""
    else:
        host = host.partition(":")[0]
    return _ascii(urllib.parse.unquote(host) if "%" in host else host)


def is_blocked(host: str, domains: frozenset[str]) -> bool:
    """Whether the host, or a domain that it is a subdomain of, is in the list."""
    while host:
        if host in domains:
            return True
        host = host.partition(".")[2]
    return False


def _ascii(host: str) -> str:
    host = host.strip().rstrip(".")
    if len(host) > _MAX_HOST:
        return ""
    if not host.isascii():
        try:
            host = host.encode("idna").decode()
        except UnicodeError:
            return ""
    return host.lower()


# ------------------------------------------------------------------------------------------- hashes


def read_hashes(path: str) -> frozenset[str]:
    """The sha256 of a list, 64 hex digits a line; `#` starts a comment.

    Raises:
      BadInput: no such file, or a line that is no sha256.
    """
    hashes = set()
    for number, line in _lines(path, "blocked_hashes"):
        text = line.partition("#")[0].strip().lower()
        if not text:
            continue
        if not re.fullmatch(r"[0-9a-f]{64}", text):
            raise errors.BadInput(
                f"config.filters.safety.blocked_hashes: line {number} of {path} is no sha256:"
                f" {line.strip()[:80]!r}; write 64 hexadecimal digits in each line."
            )
        hashes.add(text)
    return frozenset(hashes)


def _lines(path: str, name: str) -> list[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return list(enumerate(file, 1))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise errors.BadInput(
            f"config.filters.safety.{name}={path} cannot be read ({reason}): name a text file."
        ) from error


# --------------------------------------------------------------------------------------------- head


def load_head(name: str) -> Head:
    """The function from embeddings float32 [n, d] to scores float [n] in 0..1.

    Args:
      name: a file of a linear head, whose score is the sigmoid, or "module:function".

    Raises:
      BadInput: nothing of that name, or not such a head; the function, for embeddings of another
        width or, given by name, scores that are none.
    """
    if name.endswith(HEAD_FILES):
        return functools.partial(_linear_scores, name, *_read_linear(name))
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise errors.BadInput(
            f"config.filters.safety.head={name} cannot be loaded ({error}): name a file"
            f" ({', '.join(HEAD_FILES)}) or module:function."
        ) from error
    return functools.partial(_called_scores, name, found)


def _read_linear(path: str) -> tuple[np.ndarray, np.float32]:
    where = f"config.filters.safety.head={path}"
    try:
        if path.endswith(".npz"):
            with np.load(path) as file:
                arrays = {key: file[key] for key in file.files}
        else:
            import safetensors.numpy

            arrays = safetensors.numpy.load_file(path)
    except Exception as error:  # a damaged file fails in many ways
        raise errors.BadInput(
            f"{where} cannot be read ({str(error).partition(chr(10))[0]}): name a file with the"
            " arrays weight and bias."
        ) from error
    if not {"weight", "bias"} <= arrays.keys():
        raise errors.BadInput(
            f"{where} holds {', '.join(sorted(arrays)) or 'nothing'}: it needs the arrays weight"
            " and bias."
        )
    weight, bias = arrays["weight"], arrays["bias"]
    if sum(size > 1 for size in weight.shape) > 1 or bias.size != 1 or not weight.size:
        raise errors.BadInput(
            f"{where} has a weight of shape {weight.shape} and a bias of shape {bias.shape}: it"
            " needs one output, a weight [d] or [d, 1] and one bias."
        )
    weight, bias = weight.astype(np.float32).ravel(), np.float32(bias.reshape(()))
    if not (np.isfinite(weight).all() and np.isfinite(bias)):
        raise errors.BadInput(
            f"{where} holds numbers that are not finite: train or fetch it again."
        )
    return weight, bias


def _linear_scores(name: str, weight: np.ndarray, bias: np.float32, x: np.ndarray) -> np.ndarray:
    if x.shape[1] != len(weight):
        raise errors.BadInput(
            f"config.filters.safety.head={name} is for embeddings of {len(weight)} numbers, those"
            f" of config.clip have {x.shape[1]}: take the head of that model."
        )
    # Not x @ weight: a sum whose order is the same for any number of rows and threads.
    logits = np.einsum("nd,d->n", x, weight, optimize=False) + bias
    return 0.5 * (1 + np.tanh(0.5 * logits))  # the sigmoid, without overflow


def _called_scores(name: str, function: Callable, x: np.ndarray) -> np.ndarray:
    scores = np.asarray(function(x))
    good = scores.shape == (len(x),) and np.issubdtype(scores.dtype, np.floating)
    if not good or not ((scores >= 0) & (scores <= 1)).all():
        raise errors.BadInput(
            f"config.filters.safety.head={name} gives no scores: it must map float32 [n, d] to"
            " float [n] in 0..1."
        )
    return scores


def _file_of(head: str) -> str:
    """What a head's scores depend on: its file, or the source of its module."""
    if head.endswith(HEAD_FILES):
        return head
    return importlib.util.find_spec(head.partition(":")[0]).origin or sys.executable

"""What the keys of a config file mean: the comments in its source, found without running it.

A key's comment stands beside it, or above where it has none beside; a key without either takes its
group's.  Comments are followed to where a file takes its keys from: `mofi.get_config()` of another
config, `common.model(...)`, a dictionary with a name.  What the nearer file says comes behind it.
"""

import ast
import dataclasses
import io
import pathlib
import sys
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

_HERE = "Here: "
ANY = "*"  # in a path: a name that only the running config knows
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a config: its dotted name, its value there, and what its source says of it."""

    name: str
    default: Any
    comment: str


def describe(path: str, config: ml_collections.ConfigDict) -> list[Key]:
    """The keys of a config by name, without groups; a comment may be empty.

    Args:
      path: the file that made it.
      config: what its `get_config` gave; defaults are its values, references resolved.
    """
    found = comments(path)
    return [Key(".".join(name), value, _nearest(found, name)) for name, value in leaves(config)]


def comments(path: str) -> dict[Path, str]:
    """Path of a key or a group -> its comment, for those that have one; see `ANY`."""
    file = pathlib.Path(path)
    return _Module(file).returned("get_config") if file.is_file() else {}


def own(found: Mapping[Path, str], name: Path) -> str:
    """The comment of exactly this key or group, "" where it has none."""
    if name in found:
        return found[name]
    fits = (
        text
        for path, text in found.items()
        if len(path) == len(name)
        and all(part in (ANY, known) for part, known in zip(path, name, strict=True))
    )
    return next(fits, "")


def added(text: str) -> str:
    """Of a comment what the nearer file adds to that of the file it takes the key from."""
    return text.partition(_HERE)[2]


def _nearest(found: Mapping[Path, str], name: Path) -> str:
    texts = (own(found, name[:length]) for length in range(len(name), 0, -1))
    return next(filter(None, texts), "")


def leaves(config: Any, before: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Path and value of each key, without groups but for empty ones."""
    for name, value in config.items():
        if hasattr(value, "items") and len(value):
            yield from leaves(value, (*before, name))
        else:
            yield (*before, name), value


class _Module:
    """One source file: its comments by line, its functions, and the modules that it names."""

    def __init__(self, file: pathlib.Path):
        with tokenize.open(file) as lines:
            source = lines.read()
        self.functions: dict[str, ast.FunctionDef] = {}
        self.imports: dict[str, str] = {}
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
                self.imports.update(names)
        # Of a line: what stands behind its code, or is all of it.
        self.beside: dict[int, str] = {}
        self.alone: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                code = token.line[: token.start[1]].strip()
                (self.beside if code else self.alone)[token.start[0]] = token.string[1:].strip()
        self._seen: dict[str, dict[Path, str]] = {}

    def returned(self, function: str) -> dict[Path, str]:
        """The comments of what a function returns; none of a function that is not here."""
        if function not in self._seen and function in self.functions:
            self._seen[function] = {}  # where it calls itself
            self._seen[function] = _Body(self, self.functions[function]).returned
        return self._seen.get(function, {})

    def comment(self, first: int, last: int) -> str:
        """Of the code on these lines."""
        if beside := [self.beside[n] for n in range(first, last + 1) if n in self.beside]:
            return " ".join(beside)
        above: list[str] = []
        while (first := first - 1) in self.alone:
            above.insert(0, self.alone[first])
        return " ".join(above)

    def other(self, name: str) -> "_Module | None":
        """The module that this one calls `name`: the config has run, so it is imported."""
        file = getattr(sys.modules.get(self.imports.get(name, "")), "__file__", None)
        return _Module(pathlib.Path(file)) if file and file.endswith(".py") else None


class _Body:
    """What the statements of a function say of the dictionaries that it makes."""

    def __init__(self, module: _Module, function: ast.FunctionDef):
        self.module = module
        self.returned: dict[Path, str] = {}
        self._of: dict[str, dict[Path, str]] = {}  # a variable -> comments by path
        self._places: dict[str, tuple[str, Path]] = {}  # given = config.given
        for statement in function.body:
            self._read(statement)

    def _read(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            self._assign(targets, node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = node.value.func
            updated = isinstance(called, ast.Attribute) and called.attr == "update"
            if updated and (place := self._place(called.value)):
                for value in node.value.args:
                    self._put(place, self._shape(value))
        elif isinstance(node, ast.Return) and node.value is not None:
            self.returned |= self._shape(node.value)
        else:
            for part in ("body", "orelse"):
                for inner in getattr(node, part, []):
                    self._read(inner)

    def _assign(self, targets: list[ast.expr], node: Any) -> None:
        places = [place for target in targets if (place := self._place(target))]
        shape = self._shape(node.value) if node.value else {}
        deep = next((place for place in places if place[1]), None)
        for name, path in places:
            if deep and not path:
                self._places[name] = deep
            elif path:
                # Of a dictionary or a call over several lines the first one alone is its own.
                wide = isinstance(node.value, ast.Dict | ast.Call | ast.DictComp)
                text = self.module.comment(node.lineno, node.lineno if wide else node.end_lineno)
                self._put((name, path), {(): text} if text else {})
                self._put((name, path), shape)
            elif isinstance(node, ast.AugAssign):
                self._put((name, ()), shape)
            else:
                self._of[name] = dict(shape)

    def _put(self, place: tuple[str, Path], shape: Mapping[Path, str]) -> None:
        name, path = place
        mine = self._of.setdefault(name, {})
        for inner, text in shape.items():
            if before := mine.get(path + inner, ""):
                here = "" if _HERE in before else _HERE
                text = f"{before.rstrip('.')}. {here}{text}"
            mine[path + inner] = text

    def _place(self, node: ast.expr) -> tuple[str, Path] | None:
        """``config.data["dir"]`` -> ("config", ("data", "dir"))."""
        if isinstance(node, ast.Name):
            return self._places.get(node.id, (node.id, ()))
        if not isinstance(node, ast.Attribute | ast.Subscript):
            return None
        if (place := self._place(node.value)) is None:
            return None
        step = node.attr if isinstance(node, ast.Attribute) else getattr(node.slice, "value", ANY)
        return place[0], (*place[1], str(step))

    def _shape(self, node: ast.expr) -> dict[Path, str]:
        """Comments inside an expression that makes a dictionary, by path."""
        if isinstance(node, ast.Dict):
            return self._entries(node)
        if isinstance(node, ast.DictComp):
            return {(ANY, *inner): text for inner, text in self._shape(node.value).items()}
        if isinstance(node, ast.IfExp):
            return self._shape(node.orelse) | self._shape(node.body)
        if isinstance(node, ast.BinOp):
            return self._shape(node.left) | self._shape(node.right)
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name):
                return self.module.returned(called.id)
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                if called.attr == "ConfigDict" and node.args:
                    return self._shape(node.args[0])
                other = self.module.other(called.value.id)
                return other.returned(called.attr) if other else {}
        if place := self._place(node):
            name, path = place
            depth = len(path)
            return {k[depth:]: t for k, t in self._of.get(name, {}).items() if k[:depth] == path}
        return {}

    def _entries(self, node: ast.Dict) -> dict[Path, str]:
        found: dict[Path, str] = {}
        starts = [key.lineno for key in node.keys if key is not None]
        for key, value in zip(node.keys, node.values, strict=True):
            inner = self._shape(value)
            if key is None:  # **other
                found |= inner
                continue
            name = str(key.value) if isinstance(key, ast.Constant) else ANY
            found |= {(name, *rest): text for rest, text in inner.items()}
            # Keys that share a line, with one another or with the brace, share its comment.
            if starts.count(key.lineno) == 1 and key.lineno != node.lineno:
                last = key.lineno if isinstance(value, ast.Dict) else value.end_lineno
                if text := self.module.comment(key.lineno, last):
                    found[name,] = text
        return found

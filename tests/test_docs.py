"""What the README and docs/ say: links, pictures, paths, commands, flags and keys exist."""

import functools
import itertools
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

import mofi_jax
from mofi_jax.__main__ import COMMANDS
from mofi_jax.common import config_files, config_help
from tests import reference

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [
    *REPOSITORY.glob("*.md"),
    *DOCS.glob("*.md"),
    *(REPOSITORY / "launch").glob("*.md"),
    *(REPOSITORY / ".github").rglob("*.md"),
]
# Of older states of the project, which it names as they were.
HISTORY = REPOSITORY / "CHANGELOG.md"
IDS = {"ids": lambda path: str(path.relative_to(REPOSITORY))}

LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = ("mofi_jax", "data_prep", "configs", "quickstart", "benchmarks", "experiments", "tests")
FILE = re.compile(rf"(?<![\w./-])(?:{'|'.join((*FOLDERS, 'docs', 'launch'))})(?:/[\w.-]+)+")
MODULE = re.compile(rf"`({'|'.join(FOLDERS)})((?:\.[\w]+)+)`")


def test_the_reference_is_current():
    for name, write in reference.PAGES.items():
        assert (DOCS / name).read_text() == write(), "run `make reference`"


def test_the_reference_has_every_key_of_every_config():
    assert set(reference.CONFIGS) == set(config_files.shipped())
    page = (DOCS / "configuration.md").read_text()
    names = set(re.findall(r"^\| `([\w.]+)`", page, re.MULTILINE))
    for name in reference.CONFIGS:
        path, config, _ = reference.config_of(name)
        keys = config_help.describe(str(path), config)
        assert {key.name for key in keys} <= names, name
        assert [key.name for key in keys if not key.comment] == [], name


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    shutil.copy(REPOSITORY / "mkdocs.yml", tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stderr
    site, listed = tmp_path / "runs" / "site", (REPOSITORY / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert (site / f"{page.stem}.html").is_file(), page
        assert f": {page.name}\n" in listed, f"{page} is in no menu"
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\W?(?:https?:)?//")
    for page in site.rglob("*.html"):
        assert not loads.search(page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )\W?(?:https?:)?//", style.read_text()), style


@pytest.mark.parametrize("page", PAGES, **IDS)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if page.parent == DOCS:  # what the site has
            assert target.resolve().is_relative_to(DOCS), link
        if anchor:
            assert anchor in anchors(target), link


@functools.cache
def anchors(page):
    """Of headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY], **IDS)
def test_files_and_modules_that_are_named_exist(page):
    text = page.read_text()
    for name in set(FILE.findall(text)):
        name = name.rstrip(".-")
        assert (REPOSITORY / name).exists(), name
    for first, rest in set(MODULE.findall(text)):
        assert exists(first + rest), first + rest
    for target in re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", text, re.MULTILINE):
        makefile = (REPOSITORY / "Makefile").read_text()
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


def exists(dotted):
    """Whether this is a module, or something that one defines."""
    *folders, last = dotted.split(".")
    path = REPOSITORY.joinpath(*folders)
    if (path / last).is_dir() or (path / f"{last}.py").is_file():
        return True
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    defined = rf"^(?:def |class |from .* import .*\b|import .*\b)?{last}\b"
    return file.is_file() and re.search(defined, file.read_text(), re.MULTILINE)


def commands(text):
    """Every `mofi ...` and `python -m ...` of a page, as lists of words."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [code for code in re.findall(r"`([^`\n]+)`", text) if "--" in code or "-m" in code]
    for line in lines:
        found = re.match(r"(?:[A-Z_]+=\S+ )*\S*?(?:mofi|python3? -m) +(?=[a-z])", line.strip())
        if found:
            yield found[0].endswith("-m "), shlex.split(line.strip()[found.end() :], comments=True)


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY], **IDS)
def test_commands_their_flags_configs_and_keys_exist(page):
    for is_module, words in commands(page.read_text()):
        told = " ".join(words)
        name, *rest = words
        if is_module and name not in COMMANDS.values():
            assert name.partition(".")[0] not in FOLDERS or exists(name), told
        else:
            command = {module: command for command, module in COMMANDS.items()}.get(name, name)
            assert command in COMMANDS, told
            check_flags(command, rest, told)


def check_flags(command, words, told):
    flags = {flag for flag, *_ in reference.flags(command)} | {"--help"}
    known = all_keys()
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        if flag == "--config" and flag in flags:
            name, _, arguments = (value if equals else following).strip("[]").partition(":")
            name = name.removeprefix("configs/").removesuffix(".py")
            if name == "..." or name.isupper():
                continue
            assert name in config_files.shipped() or name == "my", told
            known = keys_of(name)
            for argument in filter(None, arguments.split(",")):
                argument = argument.partition("=")[0]
                assert argument in (*arguments_of(name), "...", "ARGUMENTS"), f"{argument}: {told}"
    for word in words:
        flag = word.partition("=")[0].strip("[]")
        if flag.startswith("--config."):
            key = flag.removeprefix("--config.")
            # A group may be set whole, and what has no keys yet be given some.
            assert any(f"{k}.".startswith(f"{key}.") or key.startswith(f"{k}.") for k in known), (
                f"{flag}: {told}"
            )
        elif flag.startswith("--"):
            assert flag in flags, f"{flag}: {told}"


def keys_of(name):
    return {".".join(path) for path, _ in config_help.leaves(reference.config_of(name)[1])}


@functools.cache
def all_keys():
    return set().union(*map(keys_of, reference.CONFIGS)) | {"KEY"}


def arguments_of(name):
    return reference.config_of(name)[2]


def test_ci_and_pre_commit_run_what_developers_run():
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    runs = [step["run"] for step in steps if "run" in step]
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in ("test", "smoke"):
        assert any(run.startswith(f"make {target} ") for run in runs)
        assert f"\n{target}:" in makefile
    [build] = [run for run in runs if "zensical" in run]
    assert build.removeprefix("python ") in makefile
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0][
        "hooks"
    ]
    [ruff] = {name for hook in hooks for name in hook["additional_dependencies"]}
    assert re.search(
        rf"^{re.escape(ruff)} ", (REPOSITORY / "requirements-test.txt").read_text(), re.MULTILINE
    )


def test_the_version_to_cite_is_the_package_s():
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert str(cited["version"]) == mofi_jax.__version__

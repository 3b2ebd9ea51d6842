"""--config: configs by name and by path, keys by dotted names, one sentence for what is wrong."""

import os

import ml_collections
import pytest

from mofi_jax.common import config_files, packages
from mofi_jax.common.errors import BadInput

CONFIG = """
import ml_collections
def get_config(arg="3"):
    config = ml_collections.ConfigDict({
        "number": int(arg), "rate": 0.5, "on": False, "text": "a", "none": None, "names": ("x",),
        "group": {"inner": 1}, "mine": {}, "stages": ({"length": "5 steps"},),
        "evaluators": {"seen": {"kind": "retrieval", "every": "5 steps"}},
        "drop_types": {"list": "Q1"},
    })
    config.placed = ml_collections.config_dict.placeholder(float)
    config.follows = config.get_ref("number")
    return config
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my config.py"
    path.write_text(CONFIG)
    return str(path)


def read(path, *arguments):
    config, source, rest = config_files.read(["main", "--config", path, *arguments])
    return config, source.overrides, rest


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        (["--config.number=7"], {"number": 7, "follows": 7}),
        (["-config.number", "-7"], {"number": -7}),
        (["--config.rate=3"], {"rate": 3.0}),
        (["--config.rate=1e-3"], {"rate": 0.001}),
        (["--config.on"], {"on": True}),
        (["--config.on=true", "--noconfig.on"], {"on": False}),
        (["--config.text=7"], {"text": "7"}),
        (["--config.text==a=b"], {"text": "=a=b"}),
        (["--config.text=None"], {"text": None}),
        (["--config.none=[1, 'a']"], {"none": [1, "a"]}),
        (["--config.none=a b"], {"none": "a b"}),
        (["--config.placed=2"], {"placed": 2.0}),
        (["--config.placed=2", "--config.placed=None"], {"placed": None}),
        (["--config.names=('a', 'b')"], {"names": ("a", "b")}),
        (["--config.names=a", "--config.names=/b*,(c)"], {"names": ("a", "/b*,(c)")}),
        (["--config.names=()"], {"names": ()}),
        (["--config.group.inner=2"], {"group": {"inner": 2}}),
        (["--config.group={'inner': 4}"], {"group": {"inner": 4}}),
        (["--config.stages[0].length=9 steps"], {"stages": ({"length": "9 steps"},)}),
        # Names of the user's choice.
        (["--config.mine.a-1=/p", "--config.mine.0b=0.5"], {"mine": {"a-1": "/p", "0b": 0.5}}),
        (["--config.mine.a.b.c=True"], {"mine": {"a": {"b": {"c": True}}}}),
        (["--config.drop_types.new=7"], {"drop_types": {"list": "Q1", "new": "7"}}),
        (
            ["--config.evaluators.seen.every=5 percent", "--config.evaluators.own.kind=knn"],
            {
                "evaluators": {
                    "seen": {"kind": "retrieval", "every": "5 percent"},
                    "own": {"kind": "knn"},
                }
            },
        ),
    ],
)
def test_keys_take_values_of_their_type(flags, values, own):
    config, overrides, rest = read(own, *flags, "--workdir=w", "more")
    assert rest == ["main", "--workdir=w", "more"]
    found = config.to_dict()
    for key, value in values.items():
        assert found[key] == value
        assert type(found[key]) is type(value)
    assert {key.split(".")[0].split("[")[0] for key in overrides} <= values.keys()
    # The same by the flags that tell another process of it.
    again, _, _ = read(own, *(f"--config.{key}={value}" for key, value in overrides.items()))
    assert again.to_dict() == found


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--config.numbr=7", "no key --config.numbr in .*: did you mean --config.number?"),
        ("--config.group.iner=7", "did you mean --config.group.inner?"),
        ("--config.group.nr=7", "--help=group shows those of group."),
        ("--config.number.inner=7", "did you mean --config.group.inner?"),
        ("--config.zzz=7", "no key --config.zzz in .*: --help shows which it has."),
        ("--config.number.deep=7", "no key --config.number.deep"),
        ("--config.evaluatrs.a.kind=b", "no key --config.evaluatrs.a.kind"),
        ("--config.number=7.5", "--config.number=7.5 cannot be used: give a whole number, as 3."),
        ("--config.number=None", "give a whole number"),
        ("--config.rate=many", "--config.rate=many cannot be used: give a number, as 0.5."),
        ("--config.on=maybe", "give True or False."),
        ("--config.names=('a', b)", "give values in brackets"),
        ("--config.group=3", "cannot be used: set its keys, as --config.group.inner=VALUE."),
        ("--config.stages[3].length=7", "no key --config.stages"),
        ("--config.=7", "cannot be read: write --config.KEY=VALUE."),
        ("--config.a..b=7", "cannot be read"),
        ("--config.mine['a.b']=7", "cannot be read"),
        ("--config.number", "--config.number has no value"),
    ],
)
def test_what_cannot_be_set_is_one_sentence(flag, sentence, own):
    with pytest.raises(BadInput, match=sentence.replace("?", r"\?")):
        read(own, flag)


def test_a_config_is_found_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mofi").mkdir()
    for name in config_files.shipped():
        path, arguments = config_files.find(f"{name}:a=b:c")
        assert os.path.isfile(path)
        assert arguments == "a=b:c"
        assert callable(config_files.module(path).get_config)
    assert {"mofi", "i2e", "sweeps/learning_rate"} <= {*config_files.shipped()}
    config, overrides, _ = read("kb:languages=de", "--config.drop_types.x=Q1")
    assert config.languages == ("de", "mul")
    assert overrides == {"drop_types.x": "Q1"}
    config, _, _ = read("i2e", "--config.filters.eval_sets.my-set=/tars")
    assert config.filters.eval_sets.to_dict() == {"my-set": "/tars"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("moffi:a=b", "There is no config 'moffi': did you mean mofi?"),
        ("common", "There is no config 'common'"),
        ("mine:a", "There is no config 'mine': did you mean the file mine.py?"),
        ("../configs/mofi", "There is no config"),
        ("configs/mofi.py", "write --config mofi for the one that comes with the project."),
        ("none.py:a", "There is no config file 'none.py': check the path of --config."),
        ("quickstart:task=x", "Unknown task 'x'"),
        ("quickstart:size=3", "config argument 'size'"),
        ("", "--config is missing"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_sentence(given, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    with pytest.raises(BadInput, match=sentence.replace("?", r"\?")):
        read(given)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("x = 1\nx = y\n", r"fails in line 2 \(NameError: name 'y' is not defined\): mend it"),
        ("def get_config(:\n", r"fails in line 1 \(SyntaxError: "),
        ("from configs import nothing\n", "fails in line 1"),
        ("x = 1\n", "has no function get_config"),
        ("def get_config():\n    return 3\n", "returns int"),
        ("def get_config():\n    return {}['a']\n", "fails in line 2 .KeyError: 'a'"),
        ("def get_config(a, b):\n    return {}\n", "fails .TypeError: "),
    ],
)
def test_a_file_that_fails_says_where(source, sentence, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(source)
    with pytest.raises(BadInput, match=sentence):
        config_files.load(str(path), None)


def test_home_and_no_config_dict(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.py").write_text("def get_config():\n    return {'a': {'b': 1}}\n")
    config, _, _ = read("~/c.py", "--config.a.b=2")
    assert isinstance(config, ml_collections.ConfigDict)
    assert config.a.b == 2


def test_ours_come_before_folders_of_the_same_name(monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    root = str(packages.ROOT)
    for name in packages.BESIDE:
        monkeypatch.delitem(packages.sys.modules, name, raising=False)
    for before in ([str(tmp_path), root], ["", str(tmp_path)], [root]):
        monkeypatch.setattr(packages.sys, "path", [*before])
        packages.prefer_ours()
        assert packages.sys.path == [root, str(tmp_path)]


def test_a_folder_that_was_deleted_stands_in_no_one_s_way(monkeypatch, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    root = str(packages.ROOT)
    monkeypatch.setattr(packages.sys, "path", ["", root])
    packages.prefer_ours()
    assert packages.sys.path == [root]

"""The command line of a run: wrong flags, recipes and values are one sentence."""

import functools
import operator
import pathlib
import re

import pytest
from absl import flags

from xclip_jax.config import load

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_flags(monkeypatch):
    """The checkout is the current folder, and flags that a command line defines are gone after the test."""
    monkeypatch.chdir(ROOT)
    before, parsed = set(flags.FLAGS), flags.FLAGS.is_parsed()
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    (flags.FLAGS.mark_as_parsed if parsed else flags.FLAGS.unparse_flags)()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--config", "configs/demo.py", "--config.optim.lrr=1"], "'optim.lrr' is unknown; did you mean 'optim.lr'?"),
        (["--config", "demo", "--config.steps=abc"], "flag --config.steps=abc: "),
        (["--config", "demo", "--config.steps=https://u:p@h/a?s=1"], "flag --config.steps=https://h/a: "),
        (["--config", "configs/demo.py:preset=X/1"], "it must be one of 'Ti/12', 'S/16',"),
        (["--config", "demo", "--confg.optim.lr=1"], "confg.optim.lr"),
        (["--config", "dmo"], "'dmo' is unknown; did you mean 'demo'? Give a path FILE.py"),
        (["--config", "demo", "--config.data.sources[0]=demo:train"], "0 is not a valid index for"),
        (["--config", "demo:steps=0"], "config argument steps='0'"),
        (["--config", "small"], "small:pairs=PATH"),
        (["--config", "small:pairs=/nowhere"], "'/nowhere'"),
        (["--config", "demo", "--config.data.batch-size=1"], "'data.batch-size' is unknown; did you mean 'data.batch'"),
        ([], "--config is missing or empty"),
        (["--config"], "--config is missing or empty"),
        (["--config", "configs/demo.py", "optim.lr=1"], "'optim.lr=1'; set config keys with --config.KEY=VALUE"),
        (["--config", "configs/pretrain.py:data=cc4m"], "data is 'cc4m'"),
        (["--config", "pretrain:data=35m"], "data=35m needs root=FOLDER"),
    ],
)
def test_bad_command_lines(line, message):
    with pytest.raises(SystemExit) as stopped:
        load.parse(["xclip-jax", *line])
    assert message in stopped.value.code and stopped.value.code.startswith("error: ")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("data.text_columns=title,alt", ("title", "alt")),
        ("data.text_columns=title:0.8,alt:.2", ("title:0.8", "alt:.2")),
        ("data.text_columns=('title','alt')", ("title", "alt")),
        ("data.text_columns=_title,標題,élan", ("_title", "標題", "élan")),
        ("eval.sets=emoji/test_concepts,cifar10@/data/c", ("emoji/test_concepts", "cifar10@/data/c")),
        ("data.crop_scale=0.5,1.0", (0.5, 1.0)),
        ("run=a,b", "a,b"),
    ],
)
def test_a_list_of_names_needs_no_quotes(flag, value):
    load.parse(["xclip-jax", "--config", "demo", f"--config.{flag}"])
    assert functools.reduce(operator.getitem, flag.partition("=")[0].split("."), flags.FLAGS.config) == value


def test_a_recipe_is_described_with_its_flags(capsys):
    flag = ["--config.steps=20", "--config.data.batch", "8", "--config.data.text_columns", "title,alt"]
    load.parse(["xclip-jax", "--config", "small:pairs=folder:x,count=100,device=cpu", *flag])
    assert flags.FLAGS.config.data.text_columns == ("title", "alt")
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"small: 100 pairs, .*, batch 8, 20 steps \(2 epochs\), .*\n", err)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("\nimport no_such_package\n", "{}, line 2: ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = 1\ny = (\n", "{}: SyntaxError: '(' was never closed (mine.py, line 2)"),
        (
            "from xclip_jax.config import recipes\n\ndef get_config(arg):\n"
            "    config = recipes.base('clip', 'Ti/12')\n    config.optim.lrr = 1\n",
            '{}, line 5: AttributeError: \'Key "lrr" does not exist and cannot be added since the config is locked.',
        ),
    ],
)
def test_an_error_of_an_own_recipe_has_its_file_and_line(recipe, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(recipe)
    with pytest.raises(SystemExit) as stopped:
        load.parse(["xclip-jax", "--config", str(file)])
    assert stopped.value.code.startswith(f"error: {message.format(file)}")
    assert len(stopped.value.code.splitlines()) == 1


def test_an_own_recipe_may_declare_dataclasses(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("""from __future__ import annotations
import dataclasses
from xclip_jax.config import recipes

@dataclasses.dataclass
class Options:
    steps: int = 7

def get_config(arg):
    config = recipes.base("clip", "Ti/12")
    config.steps = Options().steps
    return config
""")
    assert load.load_config("~/mine.py").steps == 7

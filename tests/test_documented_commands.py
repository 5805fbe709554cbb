"""Each command of the pages and heads parses: its program, options, keys of the config, names and files exist."""

import argparse
import importlib.metadata
import importlib.util
import inspect
import pathlib
import re
import shlex
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from docs import commands
from tests import extension
from tests.extension import json_lines
from tests.helpers.furnished import RECIPE
from xclip_jax import main as cli
from xclip_jax.config import load
from xclip_jax.core.errors import Parser, UserError
from xclip_jax.evaluators import registry
from xclip_jax.train import prepare

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = commands.blocks()
EXTRAS = set(importlib.metadata.metadata("xclip_jax").get_all("Provides-Extra"))
PARSED = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("[bde]*/[a-z]*.py")} - {
    "examples.clusters",
    "docs.commands",
    "docs.curves",
    "docs.pictures",
    "benchmarks.plans",
}  # plain lists of words
LAUNCHED = ("local.sh", "slurm.sh", "tpu_pod.sh", "tpu_vm.sh")  # whose arguments are those of train
NEEDED = ("the following arguments are required", "one of the arguments")


class Parsed(Exception):
    """Ends a command once its arguments are read."""


@pytest.fixture(autouse=True)
def room(tmp_path, monkeypatch):
    """Where the readers of a page have a recipe, and parsers that only parse."""
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "configs", "studies"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("mine.py", "FILE.py"):
        (tmp_path / name).write_text(RECIPE)
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments, **options):
        raise Parsed(parse(self, *arguments, **options))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "error", Parser.error)


def parse_config(module, arguments):
    """The recipe and the keys exist, values have their types, and sources and sets are known."""
    importlib.import_module(module)  # defines its flags
    at = next(i for i, word in enumerate(arguments) if re.match(r"--config(=|$)", word))
    name, _, argument = (arguments[at].partition("=")[2] or arguments[at + 1]).partition(":")
    rest = ["x", *arguments[:at], *arguments[at + (1 if "=" in arguments[at] else 2) :]]
    name = "mine.py" if name in ("RECIPE", "CONFIG") else name
    file = importlib.util.spec_from_file_location("recipe", load.find_recipe(name))
    recipe = importlib.util.module_from_spec(file)
    file.loader.exec_module(recipe)
    config = recipe.get_config(argument or None).lock()
    load.check_keys(config, rest)
    rest = [load.quote_list(config, word) for word in load._join_values(rest)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
    others = {word.partition("=")[0].lstrip("-") for word in rest[1:] if re.match(r"--(?!config\.)", word)}
    assert others <= set(flags.FLAGS)
    values(["x", *(word for word in rest if word.startswith("--config."))])
    if module.endswith(".train") and not hasattr(recipe, "fill_in"):  # else data decide on keys that are empty here
        prepare.check_names(values.config)


def parse_module(name, arguments, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    takes = inspect.signature(module.main).parameters
    try:
        module.main(*([arguments] if takes else []))
    except Parsed as parsed:
        return parsed.args[0]
    raise AssertionError(f"{name} reads no arguments")


def parse(words, monkeypatch):
    """Parse the words of one command."""
    program, *arguments = words
    if program == "python" and arguments[:2] == ["-m", "xclip_jax.main"]:
        program, arguments = "xclip-jax", arguments[2:]
    if program == "xclip-jax" and arguments:
        command = "train" if arguments[0].startswith("-") else arguments.pop(0)
        assert command in cli.COMMANDS
        module = f"xclip_jax.commands.{command}"
        if command in ("train", "plan") or "--config" in arguments:
            parse_config(module, arguments)
            return
        options = parse_module(module, arguments, monkeypatch)
        for name in registry.split_names(",".join(getattr(options, "suite", None) or ["demo"])):
            assert name in registry.all_suites() or name.startswith("retrieval/") or registry.check(name)
    elif program == "bash":
        assert pathlib.Path(ROOT, arguments[0]).is_file()
        if arguments[0].removeprefix("launch/") in LAUNCHED and "--config" in arguments:
            dry = arguments[1] == "--dry-run"
            parse_config(f"xclip_jax.commands.{'plan' if dry else 'train'}", arguments[2 if dry else 1 :])
    elif program == "pip":
        assert set(re.findall(r"[a-z-]+", "".join(re.findall(r"^\.\[(.+)\]", " ".join(arguments[1:]))))) <= EXTRAS
    elif program == "python" and arguments[0] == "-m":
        name = arguments[1]
        assert name.startswith("big_vision.") or importlib.util.find_spec(name)
        if name in PARSED:
            parse_module(name, arguments[2:], monkeypatch)


def simple(block, part):
    """The words of a simple command, with what the block exports, without variables before the program."""
    given = dict(re.findall(r"([A-Z]+)=(\"[^\"]*\"|\S+)", " ".join(block.commands)))
    filled = [given[word[1:]].strip('"').split() if word[1:] in given else [word] for word in shlex.split(part)]
    words = [re.sub(r"\$([A-Z]+)", lambda match: given.get(match[1], ""), word) for words in filled for word in words]
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    return words


def of_another_commit(block):
    """Whether the page says at which commit its commands are found."""
    return re.search(r"(commit|checkout) [0-9a-f]{8}\b", (ROOT / block.place.partition(":")[0]).read_text())


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_command_parses(block, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_lab", extension)
    monkeypatch.setitem(sys.modules, "my_lab.json_lines", json_lines)
    for command in block.commands:
        for part in command.split(" && "):
            words = simple(block, part)
            try:
                if words:
                    parse(words, monkeypatch)
            except SystemExit as end:
                assert block.mention and any(text in str(end) for text in NEEDED), end
            except (AssertionError, ModuleNotFoundError, UserError):
                if not of_another_commit(block):
                    raise


def test_all_places_are_read():
    """A page or head whose form the list does not know would be without commands."""
    places = " ".join(block.place for block in BLOCKS)
    for name in ("README.md", "docs/data.md", "examples/", "configs/", "benchmarks/", "xclip_jax/commands/", "launch/"):
        assert name in places
    assert sum(len(block.commands) for block in BLOCKS) > 250

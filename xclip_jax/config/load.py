"""The config of a command: loads the recipe, checks the overrides, and reports what is wrong in one sentence."""

import ast
import importlib.util
import inspect
import itertools
import pathlib
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from xclip_jax.config import schema
from xclip_jax.core import fields, imports
from xclip_jax.core.errors import UserError, exit_with_message

TRUST = flags.DEFINE_bool(
    "trust", False, "Import the modules of other packages that files of weights name, which runs their code."
)
# Python's messages about texts of a wrong type.
_CONVERSIONS = {
    "invalid literal for int() with base 10": "an integer",
    "could not convert string to float": "a number",
    "Non-boolean argument to boolean flag": "True or False",
}


def recipes() -> dict[str, pathlib.Path]:
    """Return the files of the recipes that come with the package, by name."""
    package = pathlib.Path(__file__).parents[1]
    folders = (package / "configs", package.parent / "configs")  # in an installed package, and in a checkout
    files = next(filter(None, (sorted(folder.glob("[a-z]*.py")) for folder in folders)), [])
    return {path.stem: path for path in files}


def find_recipe(name: str) -> str:
    """Return the file of a recipe: of the package's recipe `name`, or `name` itself if it is a path.

    Raises:
      UserError: no such recipe or file.
    """
    known = recipes()
    if name in known:
        return str(known[name])
    stem, path = pathlib.PurePath(name).stem, pathlib.Path(name).expanduser()
    if path.exists() and path.suffix != ".py":
        raise UserError(
            f"{name!r} is not a recipe; to train on it, write --config {shlex.quote(f'small:pairs={name}')}, and "
            f"xclip-jax check {shlex.quote(name)} shows its pairs"
        )
    if pathlib.PurePath(name).name == name and not name.endswith(".py"):
        raise UserError(
            f"recipe {name!r} is unknown; did you mean {fields.nearest(name, known)!r}? Recipes: {', '.join(known)}; "
            "a file of your own is given by its path, FILE.py"
        )
    if not pathlib.Path(name).is_file():
        hint = f"--config {stem}" if stem in known else f"a path, or a recipe by name: {', '.join(known)}"
        raise UserError(f"config file {name!r} does not exist; give {hint}")
    return name


def _takes_one(function: Callable[..., Any]) -> bool:
    """Whether `function` can be called with one argument."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    return True


def _place(error: Exception, file: str, origin: str) -> str:
    """Return "FILE, line N": the innermost line of the recipe `file`, whose full path is `origin`, in `error`."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == origin]
    if isinstance(error, SyntaxError) and error.filename == origin:
        lines.append(error.lineno)
    return f"{file}, line {lines[-1]}" if lines else file


def load_config(spec: str) -> ml_collections.ConfigDict:
    """Return the config of the recipe in "NAME:arg" or "FILE.py:arg", locked.

    A recipe is a file with the function `get_config(arg)`, which opens no data and no weights. What depends on those
    and on the machine is set by its function `fill_in(config, arg)`, if it has one.

    Raises:
      UserError: no such recipe, or an error in it, with its line.
    """
    name, _, arg = spec.partition(":")
    file = find_recipe(name)
    module_spec = importlib.util.spec_from_file_location("config_file", file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file {file!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not callable(get_config := getattr(module, "get_config", None)):
            raise UserError(f"{file} has no function get_config(arg)")
        if not _takes_one(get_config):
            raise UserError(f"{file}: get_config takes one argument: def get_config(arg=None)")
        config = get_config(arg or None)
        if not isinstance(config, ml_collections.ConfigDict):
            raise UserError(
                f"{file} is not a config file: get_config returns {type(config).__name__}, not a ConfigDict."
            )
        if fill_in := getattr(module, "fill_in", None):
            fill_in(config, arg or None)
    except UserError:
        raise
    except Exception as error:
        place = _place(error, file, str(module_spec.origin))
        if isinstance(error, (AttributeError, KeyError)) and "since the config is locked" in str(error):
            # ConfigDict names only the last part of the key, so the message adds the line of the file.
            name = str(error).split('"')[1]
            raise UserError(f"config key {name!r} is unknown; {place}, sets it.") from error
        text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
        raise UserError(f"{place}: {type(error).__name__}: {text}") from error
    return config.lock()


def _check_words(arguments: list[str]) -> None:
    """Raise `UserError` for words that belong to no argument: often an unquoted space has split an argument."""
    flag = False  # whether the previous word is a flag whose value may come next
    for at, word in enumerate(arguments):
        if not word.startswith("-") and not flag:
            words = itertools.takewhile(lambda x: not x.startswith("-"), arguments[at:])
            before = arguments[at - 1] if at else ""
            whole = shlex.quote(" ".join([before, *words]))
            hint = f"; quote a path with spaces: {whole}" if "=" in before else ""
            raise UserError(f"unknown argument {word!r}; set config keys with --config.KEY=VALUE{hint}")
        flag = word.startswith("-") and "=" not in word


def _is_open(value: str) -> bool:
    """Whether the text of a tuple begins with a quote or bracket and leaves one open."""
    if not value.startswith(("(", "[", "'", '"')):
        return False
    try:
        ast.literal_eval(value)
    except SyntaxError as error:
        return bool(re.search("never closed|unterminated|does not match", error.msg))
    except ValueError:  # closed, and not a plain value
        return False
    return False


def check_keys(config: ml_collections.ConfigDict, overrides: list[str]) -> None:
    """Raise `UserError` for an override --config.KEY=VALUE of an unknown key, with the nearest valid key.

    A tuple with an open quote or bracket raises as well: absl might otherwise take it as plain text.
    """
    for override in overrides:
        match = re.match(r"--?(?:no)?config\.([\w.-]+)", override)
        node = config
        for i, part in enumerate(path := match[1].split(".") if match else []):
            keys = list(node) if isinstance(node, ml_collections.ConfigDict) else []
            if part not in keys:
                raise UserError(fields.unknown_key(".".join(path[: i + 1]), keys))
            node = node[part]
        value = override.partition("=")[2]
        if isinstance(node, tuple) and _is_open(value):
            raise UserError(f"config key {match[1] if match else ''} is {value!r}; quotes or brackets are not closed")


def help_text() -> str:
    """Return one line for each key of a config, with its default."""
    rows = [(f"--config.{name}={value!r}", doc) for name, value, _, doc in fields.describe(schema.Config)]
    lines = [f"  {left:<50} {doc}" if len(left) < 50 else f"  {left}\n  {'':<50} {doc}" for left, doc in rows]
    return "\n".join(["keys of a config, with the defaults that a recipe starts from:", *lines])


def parse(argv: list[str]) -> list[str]:
    """Parse the flags of a command. --config is loaded first, since its keys are flags themselves.

    Bad input ends the process with one sentence.
    """
    # config_flags can load the file itself, but shows an error in the file only below two tracebacks.
    at = next((i for i, arg in enumerate(argv) if re.fullmatch(r"--?config(=.*)?", arg)), None)
    try:
        if {"--help", "-help", "-h"} & set(argv):
            with exit_with_message():
                print(f"{sys.modules['__main__'].__doc__}\n\n{flags.FLAGS.main_module_help()}\n{help_text()}")
            sys.exit(0)
        if at is None and "--helpfull" not in argv:
            named = (word for word in argv[1:] if word.partition(":")[0] in recipes())
            recipe = next(named, "")
            remedy = f"write --config {shlex.quote(recipe)}" if recipe else "start with --config demo"
            raise UserError(f"--config is missing; {remedy}")
        if at is not None:
            _check_words(argv[1:])
            spec = argv[at].partition("=")[2] or (argv[at + 1] if at + 1 < len(argv) else "")
            rest = argv[:at] + argv[at + (1 if "=" in argv[at] else 2) :]
            with imports.trusting(
                any(arg in ("--trust", "-trust", "--trust=true") for arg in argv)
            ):  # a recipe may read weights
                config = load_config(spec)
            check_keys(config, rest)
            config_flags.DEFINE_config_dict("config", config, "Keys of the config.", sys_argv=rest)
            argv = rest
        unparsed = flags.FLAGS(argv)
        if len(unparsed) > 1:
            raise UserError(f"unknown argument {unparsed[1]!r}; set config keys with --config.KEY=VALUE")
        return unparsed
    except flags.UnrecognizedFlagError as error:
        similar = str(error).partition("Did you mean: ")[2].removesuffix(" ?")
        if key := fields.other_word(error.flagname):
            similar = f"config.{key}"
        remedy = (
            f"did you mean '--{similar}'?" if similar else "config keys are --config.KEY=VALUE, and --help lists them"
        )
        sys.exit(f"error: unknown flag '--{error.flagname}'; {remedy}")
    except (UserError, flags.Error, TypeError, ValueError) as error:
        remedy = "; --help lists the keys with their defaults" if isinstance(error, flags.IllegalFlagValueError) else ""
        text = " ".join(str(error).split())
        conversions = {} if isinstance(error, UserError) else _CONVERSIONS  # an error of a recipe keeps its text
        for python, expected in conversions.items():
            text = re.sub(rf"(\(')?{re.escape(python)}.*", f"expected {expected}", text)
        sys.exit(f"error: {text}{remedy}")
    except (MemoryError, RecursionError):  # of Python's own parser
        sys.exit("error: a value on the command line is nested too deeply to be read; write a plain value")

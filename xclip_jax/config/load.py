"""The config of a command: loads the recipe, checks the overrides, and reports faults in one sentence."""

import functools
import importlib.util
import operator
import os
import pathlib
import re
import sys
import traceback
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from xclip_jax.config import schema
from xclip_jax.config.recipes import Describe
from xclip_jax.core import fields, imports
from xclip_jax.core.console import show
from xclip_jax.core.errors import UserError, exit_with_message, redact

__all__ = ["find_recipe", "load_config", "load_recipe", "recipes"]

TRUST = flags.DEFINE_bool(
    "trust", False, "Import the modules of other packages named in files of weights, which runs their code."
)


def recipes() -> dict[str, pathlib.Path]:
    """Return the files of the package's recipes, by name."""
    package = pathlib.Path(__file__).parents[1]
    folders = (package / "configs", package.parent / "configs")  # in an installed package, and in a checkout
    files = next(filter(None, (sorted(folder.glob("[a-z]*.py")) for folder in folders)), [])
    return {path.stem: path for path in files}


def find_recipe(name: str) -> str:
    """Return the file of the package's recipe `name`, or the path `name`; `UserError` if neither exists."""
    known = recipes()
    if name in known:
        return str(known[name])
    path = os.path.expanduser(name)
    if os.path.isfile(path) and path.endswith(".py"):
        return path
    guess = f"recipe {name!r} is unknown; did you mean {fields.nearest(name, known)!r}?"
    raise UserError(f"{guess} Give a path FILE.py, or a recipe by name: {', '.join(known)}")


def load_config(spec: str) -> ml_collections.ConfigDict:
    """Return the config of the recipe in "NAME:arg" or "FILE.py:arg", locked; see `load_recipe`."""
    return load_recipe(spec)[0]


def load_recipe(spec: str) -> tuple[ml_collections.ConfigDict, Describe | None]:
    """Return the locked config of the recipe in "NAME:arg" or "FILE.py:arg", and a function that describes it.

    A recipe is a file with the function `get_config(arg)`, which opens no data and no weights. An optional function
    `fill_in(config, arg)` sets keys that depend on those and on the machine. It may return a function of the config,
    whose sentence commands print once their flags are set.

    Raises:
      UserError: no such recipe, or an error in it, with its line.
    """
    name, _, arg = spec.partition(":")
    file = find_recipe(name)
    module_spec: Any = importlib.util.spec_from_file_location("xclip_jax_recipe", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look up names of annotations there
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(arg or None)
        fill_in = getattr(module, "fill_in", None)
        describe = fill_in(config, arg or None) if fill_in else None
        return config.lock(), describe
    except UserError:
        raise
    except Exception as error:
        # The innermost line of the recipe itself.
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == module_spec.origin]
        place = f"{file}, line {lines[-1]}" if lines else file
        raise UserError(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def check_keys(config: ml_collections.ConfigDict, overrides: list[str]) -> None:
    """Raise `UserError` for an override --config.KEY=VALUE of an unknown key, with the nearest valid key."""
    for override in overrides:
        match = re.match(r"--?(?:no)?config\.([\w.-]+)", override)
        path = match[1].split(".") if match else []
        node = config
        for i, part in enumerate(path):
            keys = list(node) if isinstance(node, ml_collections.ConfigDict) else []
            if part not in keys:
                raise UserError(fields.unknown_key(".".join(path[: i + 1]), keys))
            node = node[part]


def _join_values(argv: list[str]) -> list[str]:
    """Return arguments with each pair --config.KEY VALUE as --config.KEY=VALUE."""
    joined: list[str] = []
    for argument in argv:
        if joined and re.fullmatch(r"--?config\.[\w.-]+", joined[-1]) and not argument.startswith("-"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def quote_list(config: ml_collections.ConfigDict, override: str) -> str:
    """Return --config.KEY=a,b for a list as --config.KEY=('a','b'), and any other argument unchanged."""
    match = re.fullmatch(r"(--?config\.([\w.-]+)=)([^\W\d][\w./@:-]*(?:,[^\W\d][\w./@:-]*)+)", override)
    if match is None or not isinstance(functools.reduce(operator.getitem, match[2].split("."), config), tuple):
        return override
    return f"{match[1]}{tuple(match[3].split(','))}"


def parse(argv: list[str]) -> list[str]:
    """Parse the flags of a command; bad input ends the process with one sentence.

    --config is loaded first, since its keys are flags themselves. `config_flags` could load the file, but would show
    two tracebacks above an error in it.
    """
    describe = None
    at = next((i for i, arg in enumerate(argv) if re.fullmatch(r"--?config(=.*)?", arg)), None)
    try:
        if {"--help", "-help", "-h"} & set(argv):
            with exit_with_message():
                print(f"{sys.modules['__main__'].__doc__}\n\n{flags.FLAGS.main_module_help()}")
                print("keys of a config, with the defaults that a recipe starts from:")
                for name, value, _, doc in fields.describe(schema.Config):
                    left = f"--config.{name}={value!r}"
                    print(f"  {left:<50} {doc}" if len(left) < 50 else f"  {left}\n  {'':<50} {doc}")
            sys.exit(0)
        spec = ""
        if at is not None:
            spec = argv[at].partition("=")[2] or (argv[at + 1] if at + 1 < len(argv) else "")
            argv = argv[:at] + argv[at + (1 if "=" in argv[at] else 2) :]
        if spec:
            with imports.trusting(any(re.fullmatch(r"--?trust(=(true|t|1))?", arg, re.IGNORECASE) for arg in argv)):
                config, describe = load_recipe(spec)
            check_keys(config, argv)
            argv = [quote_list(config, arg) for arg in _join_values(argv)]
            config_flags.DEFINE_config_dict("config", config, "Keys of the config.", sys_argv=argv)
        elif "--helpfull" not in argv:
            raise UserError("--config is missing or empty; start with --config demo")
        unparsed = flags.FLAGS(argv)
        if len(unparsed) > 1:
            raise UserError(f"unknown argument {unparsed[1]!r}; set config keys with --config.KEY=VALUE")
        if describe:
            # log0 would need joined processes, and stdout is for JSON.
            show(describe(flags.FLAGS.config), sys.stderr)
        return unparsed
    except (UserError, flags.UnrecognizedFlagError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except (flags.Error, IndexError, TypeError, ValueError, MemoryError, RecursionError) as error:
        text = " ".join(str(error).split()) or "a value is nested too deeply"  # for Python's parser
        sys.exit(redact(f"error: {text}; --help lists the keys with their defaults"))

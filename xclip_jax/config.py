"""The config of a command: loads the file, checks the overrides, and makes one sentence of what is wrong."""

import difflib
import importlib.util
import pathlib
import re
import sys

import ml_collections
from absl import flags
from ml_collections import config_flags

from xclip_jax.errors import UserError


def load_config(spec: str) -> ml_collections.ConfigDict:
    """`get_config(arg)` of the config file in "FILE.py:arg"."""
    file, _, arg = spec.partition(":")
    if not pathlib.Path(file).is_file():
        raise UserError(f"config file {file!r} does not exist; try configs/demo.py")
    module_spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.get_config(arg or None)


def check_keys(config: ml_collections.ConfigDict, overrides: list[str]) -> None:
    """Raises `UserError`, with the nearest valid key, for an override --config.KEY of a key that does not exist."""
    for override in overrides:
        found = re.match(r"--?(?:no)?config\.([\w.]+)", override)
        node = config
        for i, part in enumerate(path := found[1].split(".") if found else []):
            keys = list(node) if isinstance(node, ml_collections.ConfigDict) else []
            if part not in keys:
                near = difflib.get_close_matches(part, keys, n=1, cutoff=0.0)
                hint = f"; did you mean {'.'.join([*path[:i], near[0]])!r}?" if near else ""
                raise UserError(f"config key {'.'.join(path)!r} is unknown{hint}")
            node = node[part]


def parse(argv: list[str]) -> list[str]:
    """Parses flags; --config is loaded first, since its keys are flags themselves. Bad input is one sentence."""
    # config_flags can load the file itself, but buries an error of the file under two tracebacks.
    at = next((i for i, arg in enumerate(argv) if re.fullmatch(r"--?config(=.*)?", arg)), None)
    try:
        if at is None and not {"--help", "--helpfull"} & set(argv):
            raise UserError("--config is missing; start with --config configs/demo.py")
        if at is not None:
            spec = argv[at].partition("=")[2] or (argv[at + 1] if at + 1 < len(argv) else "")
            rest = argv[:at] + argv[at + (1 if "=" in argv[at] else 2) :]
            config = load_config(spec)
            check_keys(config, rest)
            config_flags.DEFINE_config_dict("config", config, "Keys of the config.", sys_argv=rest)
            argv = rest
        unparsed = flags.FLAGS(argv)
        if len(unparsed) > 1:
            raise UserError(f"{unparsed[1]!r} is no flag; keys are set as --config.KEY=VALUE")
        return unparsed
    except (UserError, flags.Error, TypeError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")

"""Classes and functions of other packages by their names, "package.module:Class".

Importing a module runs its code. Names from the command line or a recipe are the user's and are imported. Names from a
file, such as the config of downloaded weights, may be somebody else's: their modules must belong to this package or be
imported already, unless the user consents by --trust or trust=True.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from xclip_jax.core.console import setting
from xclip_jax.core.errors import UserError

_CLASS_NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")

T = TypeVar("T")

_file = ContextVar("file that names come from", default="")
_trusted = ContextVar("whether names out of files are imported", default=False)


def named_by(file: object) -> contextlib.AbstractContextManager[None]:
    """Context in which imported class names count as content of `file`."""
    return setting(_file, str(file))


def trusting(trust: bool) -> contextlib.AbstractContextManager[None]:
    """Context that imports classes named by files if `trust` is true here or in an outer context."""
    return setting(_trusted, trust or _trusted.get())


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add --trust to the arguments of a command."""
    doc = "import modules of other packages named by files of RUN, which runs their code"
    parser.add_argument("--trust", action="store_true", help=doc)


def is_imported(name: str) -> bool:
    """Whether the module of "package.module:Class" belongs to this package or has been imported."""
    module = name.partition(":")[0]
    return module.split(".")[0] == __name__.split(".")[0] or module in sys.modules


def class_name(spec: str) -> str | None:
    """Return the "package.module:Class" at the start of `spec`, or None."""
    match = _CLASS_NAME.match(spec)
    return match.group() if match else None


def import_name(name: str, what: str) -> Any:
    """Import the class or function "package.module:name"; `what` is its role.

    `UserError` for a malformed name, a missing module or attribute, or a name in a file without consent.
    """
    match = _CLASS_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{what} {name!r} is not the name of a class; expected 'package.module:Class'.")
    module_name, attribute = match.groups()
    file = _file.get()
    if file and not _trusted.get() and not is_imported(name):
        raise UserError(
            f"{file} names the {what} {name!r}, of a module outside xclip_jax that would run with your rights; "
            f"if you trust these files, add --trust (in Python trust=True, or import {module_name} first)."
        )
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{what} {name!r} cannot be imported ({error}); install its package or put its folder on PYTHONPATH."
        ) from error


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import an optional dependency; if it is not installed, a `UserError` names the `extra` (setup.py) with it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} needs {module.split('.')[0]}: pip install 'xclip_jax[{extra}]'.") from error


def import_class(name: str, base: type[T], what: str = "class", *, dataclass: bool = False) -> type[T]:
    """Import a subclass of `base` and, with `dataclass`, a dataclass; see `import_name`, also for errors."""
    value = import_name(name, what)
    derived = isinstance(value, type) and issubclass(value, base)
    if not derived or (dataclass and not dataclasses.is_dataclass(value)):
        base_name = f"{base.__module__.removesuffix('.base')}.{base.__qualname__}"
        raise UserError(f"{what} {name!r} is not a {'data' * dataclass}class derived from {base_name}.")
    return value


class LazyClassTable(collections.UserDict[str, Any]):
    """{name: subclass of `base`}, made from {name: "package.module:Class"} and imported on access to save time."""

    def __init__(self, base: type, places: Mapping[str, str]) -> None:
        super().__init__(places)
        self._base = base

    def __getitem__(self, key: str) -> Any:
        return import_class(self.data[key], self._base)

"""Classes of other packages by their names, "package.module:Class".

Importing a module runs its code. Names that the user wrote, on the command line or in a recipe, are imported. Names
out of a file, such as the config of downloaded weights, may be somebody else's: their modules must belong to this
package or be imported already, or the user must consent, by --trust or trust=True.
"""

import argparse
import contextlib
import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TypeVar

from xclip_jax.core.console import setting
from xclip_jax.core.errors import UserError

_CLASS_NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")

T = TypeVar("T")

_file = ContextVar("file that names come from", default="")
_trusted = ContextVar("whether names out of files are imported", default=False)


def named_by(file: object) -> contextlib.AbstractContextManager[None]:
    """Treat the class names that are imported in this context as content of `file`."""
    return setting(_file, str(file))


def trusting(trust: bool) -> contextlib.AbstractContextManager[None]:
    """Import classes that files name in this context, if `trust` is true here or in an outer context."""
    return setting(_trusted, trust or _trusted.get())


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add --trust to the arguments of a command that reads runs or weights."""
    doc = "import the modules of other packages that the files of RUN name, which runs their code"
    parser.add_argument("--trust", action="store_true", help=doc)


def is_imported(name: str) -> bool:
    """Whether the module of the class "package.module:Class" belongs to this package or has been imported."""
    module = name.partition(":")[0]
    return module.split(".")[0] == __name__.split(".")[0] or module in sys.modules


def class_name(spec: str) -> str | None:
    """Return the "package.module:Class" that `spec` begins with, or None."""
    match = _CLASS_NAME.match(spec)
    return match.group() if match else None


def import_class(name: str, base: type[T], what: str = "class", *, dataclass: bool = False) -> type[T]:
    """Import the class `name`, "package.module:Class", a subclass of `base`; messages call it `what`.

    Raises:
      UserError: another form of name, no such class or (`dataclass`) dataclass, or a name in a file without consent.
    """
    match = _CLASS_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{what} {name!r} is not the name of a class; expected 'package.module:Class'.")
    module_name, attribute = match.groups()
    file = _file.get()
    if file and not _trusted.get() and not is_imported(name):
        raise UserError(
            f"{file} names the {what} {name!r}, of a module that is not part of xclip_jax and would run with your "
            f"rights; if you trust these files, add --trust (in Python trust=True, or import {module_name} first)."
        )
    try:
        value = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{what} {name!r} cannot be imported ({error}); install its package or put its folder on PYTHONPATH."
        ) from error
    derived = isinstance(value, type) and issubclass(value, base)
    if not derived or (dataclass and not dataclasses.is_dataclass(value)):
        base_name = f"{base.__module__.removesuffix('.base')}.{base.__qualname__}"
        raise UserError(f"{what} {name!r} is not a {'data' * dataclass}class derived from {base_name}.")
    return value


class LazyClassTable(Mapping[str, type[T]]):
    """Built-in classes by name, imported at first use: all of them would add a second to every command."""

    def __init__(self, base: type[T], places: Mapping[str, str]) -> None:
        """Map names to their "package.module:Class" in `places`; all derive from `base`."""
        self._base = base
        self._places = places

    def __getitem__(self, name: str) -> type[T]:
        return import_class(self._places[name], self._base)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

"""Classes of other packages by their names, "package.module:Class"."""

import dataclasses
import difflib
import importlib
import inspect
import re
from typing import TypeVar

from xclip_jax.errors import UserError

_CLASS_NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")

T = TypeVar("T")


def class_name(spec: str) -> str | None:
    """Return the "package.module:Class" that `spec` begins with, or None."""
    match = _CLASS_NAME.match(spec)
    return match.group() if match else None


def import_class(name: str, base: type[T], what: str = "class", *, dataclass: bool = False) -> type[T]:
    """Import the class `name`, "package.module:Class", which must be a subclass of `base`.

    Args:
      name: where it is.
      base: class that it must derive from.
      what: what it is, for messages, such as "image tower".
      dataclass: whether it must be a dataclass.

    Raises:
      UserError: a name of another form, a module that cannot be imported, no such class in it, or one that leaves
        out what `base` requires.
    """
    match = _CLASS_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{what} {name!r} is not the name of a class; expected 'package.module:Class'.")
    module_name, attribute = match.groups()
    try:
        module = importlib.import_module(module_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{what} {name!r} cannot be imported ({error}); install its package or put its folder on PYTHONPATH."
        ) from error
    if (value := getattr(module, attribute, None)) is None:
        classes = [key for key, item in vars(module).items() if _derived(item, base) and item is not base]
        near = difflib.get_close_matches(attribute, classes, 1, 0.0)
        remedy = f"did you mean '{module_name}:{near[0]}'?" if near else "name a class of that module."
        raise UserError(f"{what} {name!r} cannot be imported (its module has no attribute {attribute!r}); {remedy}")
    if not _derived(value, base) or (dataclass and not dataclasses.is_dataclass(value)):
        base_name = f"{base.__module__.removesuffix('.base')}.{base.__qualname__}"
        raise UserError(f"{what} {name!r} is not a {'data' * dataclass}class derived from {base_name}.")
    if inspect.isabstract(value):
        members = " and ".join(sorted(value.__abstractmethods__))
        raise UserError(f"{what} {name!r} does not define {members}, which {base.__qualname__} requires; add it.")
    return value


def _derived(value: object, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base)

"""Classes of other packages by their names, "package.module:Class"."""

import importlib
import re
from typing import TypeVar

from xclip_jax.errors import UserError

_CLASS_NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")

T = TypeVar("T")


def class_name(spec: str) -> str | None:
    """Return the "package.module:Class" that `spec` begins with, or None."""
    match = _CLASS_NAME.match(spec)
    return match.group() if match else None


def import_class(name: str, base: type[T]) -> type[T]:
    """Import the class `name`, "package.module:Class", which must be a subclass of `base`.

    Raises:
      UserError: a name of another form, a module that cannot be imported, or no such subclass in it.
    """
    match = _CLASS_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{name!r} is not the name of a class; expected 'package.module:Class'.")
    module, attribute = match.groups()
    try:
        value = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise UserError(
            f"{name!r}: module {module!r} cannot be imported ({error}); install its package or put its folder on "
            "PYTHONPATH."
        ) from error
    if not (isinstance(value, type) and issubclass(value, base)):
        problem = "does not exist" if value is None else f"is not a subclass of {base.__module__}.{base.__qualname__}"
        raise UserError(f"{module}:{attribute} {problem}; name a subclass of {base.__qualname__}.")
    return value

"""Config keys: fields of frozen dataclasses with a default, a doc string and checks of values.

    @dataclasses.dataclass(frozen=True)
    class LogConfig:
        every: int = key(20, "steps between two lines of metrics; 0 for none", at_least(0))

Each module declares the group of keys it reads; `config.schema` collects them. A group may have a method
`conflicts() -> Iterable[str]` that yields faults of values in combination, each beginning with a key. A key's
declaration also states `Facts`, such as whether a resumed run may change it; `keys_where` finds keys by their facts.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np

from xclip_jax.core.errors import UserError
from xclip_jax.core.imports import import_class

__all__ = [
    "Check",
    "Facts",
    "above",
    "at_least",
    "at_most",
    "between",
    "choice",
    "fraction_below_one",
    "group",
    "key",
    "not_empty",
]

T = typing.TypeVar("T")

_MAX_FLOAT = float(np.finfo(np.float32).max)
_PLURALS = {int: "integers", float: "numbers", str: "strings"}
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}


class Check(NamedTuple):
    """Allowed values of a key: their description after "expected ...", and a test of a value with the key's type."""

    allowed: str
    accepts: Callable[[Any], bool]


def at_least(low: float) -> Check:
    """Numbers of at least `low`."""
    return Check(f"at least {low}", lambda value: value >= low)


def above(low: float) -> Check:
    """Numbers greater than `low`."""
    return Check(f"a value above {low}", lambda value: value > low)


def at_most(high: float) -> Check:
    """Numbers up to `high`."""
    return Check(f"at most {high}", lambda value: value <= high)


def between(low: float, high: float) -> Check:
    """Numbers from `low` to `high`, both included."""
    return Check(f"a value from {low} to {high}", lambda value: low <= value <= high)


def not_empty() -> Check:
    """Non-empty strings."""
    return Check("a string that is not empty", bool)


def fraction_below_one() -> Check:
    """Numbers from 0 to 1, excluding 1 and numbers that round to 1 in float32."""
    return Check("at least 0 and below 1", lambda value: bool(0 <= np.float32(value) < 1))


def choice(valid: Iterable[Any]) -> Check:
    """One of `valid`."""
    valid = tuple(valid)
    return Check(f"one of {', '.join(map(repr, valid))}", lambda value: value in valid)


class Facts(TypedDict, total=False):
    """Facts about a config key, or about all keys of a group; each is absent unless it holds.

    Attributes:
      resume: "free" if a resumed run may have another value: it does not influence training, or files guard it.
      host: "own" if each host may have its own value, for example for its copy of the data.
      evaluation: "model" if the key changes the evaluated model, "sets" if it changes the evaluation data.
      compared: False if the key is irrelevant to comparisons between runs in a report.
      card: the key's part of the recipe in a model card.
    """

    resume: Literal["free"]
    host: Literal["own"]
    evaluation: Literal["model", "sets"]
    compared: Literal[False]
    card: Literal["batch", "optimizer", "images", "model", "seed"]


def key(default: Any, doc: str, *checks: Check, **facts: Unpack[Facts]) -> Any:
    """Declare a config key: a dataclass field with a doc string, checks and facts."""
    metadata = {"doc": doc, "checks": checks, "facts": facts}
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def derived(default: Any) -> Any:
    """Declare a field of a config dataclass whose value comes from another group: not a key."""
    return dataclasses.field(default=default, metadata={"derived": True})


def group(config_type: type[Any], **facts: Unpack[Facts]) -> Any:
    """Declare a group of config keys, a dataclass field of type `config_type`, with facts about all its keys."""
    return dataclasses.field(default_factory=config_type, metadata={"facts": facts})


def _type_name(expected: Any) -> str:
    if expected in _TYPE_NAMES:
        return _TYPE_NAMES[expected]
    origin = typing.get_origin(expected)
    args = typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, args))
    if origin is Mapping:
        return "a group of keys"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a tuple of {len(args)} values, {', '.join(map(_type_name, args))}"
    return f"a tuple of {_PLURALS.get(args[0], 'tuples')}"


def _matches(value: Any, expected: Any) -> bool:
    if expected is Any:
        return True
    if expected is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value) and abs(value) <= _MAX_FLOAT
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(expected, type):
        return isinstance(value, expected)
    origin = typing.get_origin(expected)
    args = typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in args)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_matches(item, args[1]) for item in value.values())
    if not isinstance(value, (list, tuple)):
        return False
    if origin is tuple and args[-1] is not Ellipsis:
        return len(value) == len(args) and all(map(_matches, value, args))
    return all(_matches(item, args[0]) for item in value)


def with_tuples(value: Any) -> Any:
    """Replace the lists of JSON by tuples."""
    return tuple(map(with_tuples, value)) if isinstance(value, (list, tuple)) else value


def _value_fault(path: str, value: Any, expected: Any, checks: Sequence[Check]) -> str | None:
    if not _matches(value, expected):
        too_large = expected is float and isinstance(value, float) and math.isfinite(value)
        return f"{path} is {value!r}; expected {_type_name(expected)}{' that float32 can hold' * too_large}"
    for check in checks:
        if not check.accepts(value):
            return f"{path} is {value!r}; expected {check.allowed}"
    return None


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar of `names`, or None without names."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)), None)


def sentence(fault: str) -> str:
    """Return `fault` with a full stop, unless it is a question."""
    return fault if fault.endswith("?") else f"{fault}."


def unknown_key(key: str, names: Iterable[str]) -> str:
    """Return a sentence, without a full stop, on a dotted `key` whose last part is not in `names`."""
    prefix, dot, name = key.rpartition(".")
    near = nearest(name, names)
    return f"config key {key!r} is unknown" + (f"; did you mean {prefix + dot + near!r}?" if near else "")


def read_plugin(
    values: Mapping[str, Any], path: str, table: Mapping[str, type[T]], base: type[T], what: str, type_name: str = ""
) -> T:
    """Make an instance of the class in key "type" of the group `values`, with its other keys as options.

    The type, by default `type_name`, is a key of `table`, or "package.module:Class", a dataclass derived from `base`.
    `UserError` for another type, and for all unknown keys and wrong values.
    """
    options = dict(values)
    name = str(options.pop("type", type_name))
    if name not in table and ":" not in name:
        raise UserError(
            f"unknown {what} {name!r}; did you mean {nearest(name, table)!r}? Name a class of another package as "
            "'package.module:Class'."
        )
    found = table[name] if name in table else import_class(name, base, what, dataclass=True)
    faults: list[str] = []
    made = read_group(found, options, path, faults)
    if faults:
        raise UserError("; ".join(map(sentence, faults)))
    return made


def read_group(config_type: type[Any], values: Any, path: str, faults: list[str]) -> Any:
    """Make an instance of the config dataclass `config_type` from nested `values`.

    Args:
      config_type: dataclass of keys and groups of keys.
      values: mapping; absent keys have their defaults.
      path: dotted name of the group; "" for the whole config.
      faults: list to append a sentence to for each unknown key and each wrong value, which is replaced by its default.
    """
    prefix = f"{path}." if path else ""
    if not isinstance(values, Mapping):
        faults.append(f"{path} is {values!r}; expected a group of keys")
        return config_type()
    fields = {field.name: field for field in _declared(config_type)}
    faults += [unknown_key(f"{prefix}{name}", fields) for name in values if name not in fields]
    expected = typing.get_type_hints(config_type)
    arguments = {}
    for name, field in fields.items():
        if name not in values:
            continue
        if dataclasses.is_dataclass(expected[name]):
            arguments[name] = read_group(expected[name], values[name], prefix + name, faults)
            continue
        value = with_tuples(values[name])
        fault = _value_fault(prefix + name, value, expected[name], field.metadata["checks"])
        if fault:
            faults.append(fault)
        else:
            arguments[name] = value
    made = config_type(**arguments)
    if hasattr(made, "conflicts") and not any(fault.startswith(path) for fault in faults):
        faults.extend(f"{path}.{conflict}" if path else conflict for conflict in made.conflicts())
    return made


def describe(config_type: type[Any]) -> Iterator[tuple[str, Any, str, str]]:
    """Yield (dotted key, default, allowed values, doc string) of each key of a config dataclass."""
    for name, field, expected, _ in _keys(config_type):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        allowed = ", ".join([_type_name(expected), *(check.allowed for check in field.metadata["checks"])])
        yield name, default, allowed, field.metadata["doc"]


def keys_where(config_type: type[Any], **facts: Unpack[Facts]) -> tuple[str, ...]:
    """Return the dotted keys of a config dataclass with all of `facts`, in declaration order."""
    return tuple(name for name, _, _, known in _keys(config_type) if facts.items() <= known.items())


def as_dict(config: Any) -> dict[str, Any]:
    """Return the keys of a config dataclass and of its groups as nested dicts."""
    values = {field.name: getattr(config, field.name) for field in _declared(config)}
    return {name: as_dict(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def _declared(config_type: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config_type) if not field.metadata.get("derived")]


def _keys(
    config_type: type[Any], prefix: str = "", inherited: Mapping[str, Any] = types.MappingProxyType({})
) -> Iterator[tuple[str, dataclasses.Field[Any], Any, dict[str, Any]]]:
    """Yield (dotted key, field, type, facts) of each key of a config dataclass, with the facts of its groups."""
    expected = typing.get_type_hints(config_type)
    for field in _declared(config_type):
        facts = {**inherited, **field.metadata.get("facts", {})}
        if dataclasses.is_dataclass(expected[field.name]):
            yield from _keys(expected[field.name], f"{prefix}{field.name}.", facts)
        else:
            yield prefix + field.name, field, expected[field.name], facts

"""Tools for recipes: parse their argument, "a=1,b=x", and make default configs for an objective and a size."""

import math
from collections.abc import Callable
from typing import Any

import ml_collections

from xclip_jax.config import schema
from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.core.fields import nearest
from xclip_jax.models.two_towers import PRESETS, TOWERS, preset
from xclip_jax.objectives import OBJECTIVES, RECIPES

Describe = Callable[[ml_collections.ConfigDict], str]  # returns a sentence about a config
_KINDS = {int: "an integer", float: "a number"}


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Parse a recipe's argument, the part after ":" in --config, and return the defaults updated with its values.

    `UserError` for an unknown key or a wrong value.

    Args:
      arg: "KEY=VALUE,KEY=VALUE". After a string, a part without "=" continues it, so that paths may contain commas.
      **defaults: all keys and their defaults, which are strings, integers or numbers; a value has its default's type.
    """
    items: list[tuple[str, str]] = []
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if items and not equals and isinstance(defaults.get(items[-1][0]), str):
            items[-1] = (items[-1][0], f"{items[-1][1]},{item}")
        else:
            items.append((key, text))
    values = dict(defaults)
    for key, text in items:
        if key not in defaults:
            hint = f"did you mean {nearest(key, defaults)!r}? Known: {', '.join(defaults)}"
            hint += "; write a comma in an address as %2C" * ("://" in str(arg))
            raise UserError(f"config argument {key!r} is unknown; {hint}.")
        if [name for name, _ in items].count(key) > 1:
            raise UserError(f"config argument {key!r} is given twice; leave one out, or write {key}=A,B for a list.")
        values[key] = _convert(key, text, defaults[key])
    objective = values.get("objective", "")
    if objective != defaults.get("objective", ""):  # whose default may be "", a choice of the recipe
        check_choice("config argument objective", objective, OBJECTIVES)
    return ml_collections.ConfigDict(values)


def _convert(key: str, text: str, default: Any) -> Any:
    kind = type(default)
    low = min(default, 1) if kind is int else 0  # a default of 0 means that the recipe chooses the value
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if kind is not str and not low <= value < math.inf:
        raise UserError(f"config argument {key}={text!r}; expected {_KINDS[kind]} of at least {low}.")
    return value


def base(objective: str, size: str) -> ml_collections.ConfigDict:
    """Return the default of every key, with the terms of `objective` and the towers of preset `size`, locked.

    The defaults are SLIP's recipe (arXiv 2112.12750), a public baseline for tens of millions of pairs.
    """
    config = schema.default()
    config.run = f"runs/{objective}-{size.replace('/', '')}"
    config.objective.name = objective
    config.objective.terms = RECIPES[objective]
    set_towers(config, size)
    return config


def set_towers(config: ml_collections.ConfigDict, size: str) -> None:
    """Give both towers the sizes of the preset `size`, such as "B/16", with images of whole patches."""
    sizes = preset(size)
    config.model.img.update(sizes["img"])
    config.model.txt.update(sizes["txt"])
    config.model.embed = sizes["embed"]
    side = schema.Config().model.img.image_size
    config.model.img.image_size = side - side % config.model.img.patch  # 216 for Ti/12


def size_of(model: ml_collections.ConfigDict) -> str:
    """Return the preset with the sizes of config group `model`, or a phrase if there is none."""
    for name in PRESETS:
        sizes = preset(name)
        towers = all(model[tower][key] == value for tower in TOWERS for key, value in sizes[tower].items())
        if towers and model.embed == sizes["embed"] and not model.plugins:
            return name
    return "towers of other sizes than a preset"

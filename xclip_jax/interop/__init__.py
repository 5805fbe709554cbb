"""Weights from and to other projects, in NumPy alone: OpenAI's CLIP, open_clip, Hugging Face, and our own form.

A model travels as a pair. `config` has the groups of a run's config that a model needs, as plain dicts: "model" and
"objective" with the keys of configs/common.py; of "data" the keys tokenizer, statistics and resample ("bicubic", for
new training), of "eval" those that say how images are prepared, see `Preprocessing`. "source" says where it came from:
its format, and "notes", sentences on what was assumed or is not followed. `variables` are what `TwoTowers.apply` takes,
fp32: {"params": ..., "batch_stats": ...}, the second only where there are cluster heads.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from xclip_jax.config.fields import read_group
from xclip_jax.data import tokenizer
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import UserError, one_of
from xclip_jax.interop import hf, open_clip, param_mapping, tensor_files, vocabulary
from xclip_jax.models.layers import unstack_blocks
from xclip_jax.models.tower import ImageTower
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.run_folder import is_run

FORMATS = ("hf", "open_clip", "safetensors")
CONFIG = "xclip_config.json"
WEIGHTS = "xclip_model.safetensors"
# All that `write` may leave in a folder.
WRITTEN = (
    CONFIG, WEIGHTS, open_clip.CONFIG, open_clip.WEIGHTS, hf.CONFIG, hf.WEIGHTS, hf.PREPROCESSOR,
    vocabulary.FILE, *vocabulary.CLIP_FILES, vocabulary.OPTIONS, vocabulary.SPECIAL,
)  # fmt: skip


def read(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, variables) of weights; see the module's docstring.

    Args:
      path: a folder or a file of weights: .safetensors, or .bin, .pt and .pth as torch.save has written them since 1.6.
        Their config is looked for beside them; weights with OpenAI's names may do without, their sizes are inferred.

    Raises:
      UserError: nothing to read, files that hold more than tensors, an architecture that is not supported, or tensors
        that are missing, unknown or misshapen, by name.
    """
    file = tensor_files.find(path)
    folder = file.parent
    found, how = tensor_files.tensors(file)
    where = str(file)
    if any(name.startswith("params/") for name in found):
        return _read_own(found, folder, where)
    if any(name.startswith("visual.") for name in found):
        there = folder / open_clip.CONFIG
        config, flat = open_clip.read(
            found, how, folder, tensor_files.read_json(there) if there.exists() else None, where
        )
    elif any(name.startswith(("vision_model.", "text_model.")) for name in found):
        config, flat = hf.read(found, folder, tensor_files.read_json(folder / hf.CONFIG), where)
    else:
        names = ", ".join(list(found)[:3])
        raise UserError(f"{where} is no CLIP that is known here: its tensors are called {names}, ...")
    return config, {"params": unflatten_dict(flat, sep="/")}


def _read_own(found: tensor_files.Tensors, folder: epath.Path, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config = tensor_files.read_json(folder / CONFIG)
    if missing := [key for key in ("model", "objective", "data") if key not in config]:
        raise UserError(f"{folder / CONFIG} has no group {missing[0]!r}; export the run anew.")
    if config["data"]["tokenizer"] == vocabulary.FILE:
        config["data"]["tokenizer"] = str(folder / vocabulary.FILE)
    keys = Preprocessing.from_dict(config, _image_tower(config).image_size).to_config()
    config["data"], config["eval"] = config["data"] | keys["data"], keys["eval"]
    return config | {"source": {"format": "safetensors", "notes": ()}}, unflatten_dict(found, sep="/")


def write(variables: Mapping[str, Any], config: Mapping[str, Any], path: str, to: str = "safetensors") -> list[str]:
    """Writes a model into the folder `path`.

    Args:
      variables, config: as `read` returns them; further keys of `config`, such as a run has, do not matter.
      path: the folder; it is made. Files that were written before, in any format, are taken away first.
      to: "hf" (a CLIPModel with its processor), "open_clip", or "safetensors": ours, which loses nothing.

    Returns:
      Sentences on what the format could not hold.

    Raises:
      UserError: a model, tokenizer or preprocessing that the format does not have, or a run's folder.
    """
    one_of("to", to, FORMATS)
    if is_run(path):
        raise UserError(f"{path!r} is a run's folder; name another.")
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), dict(variables))
    folder = epath.Path(path)
    name, plugins = config["data"]["tokenizer"], config["model"].get("plugins", {})
    if plugins and to != "safetensors":
        types = ", ".join(f"{tower} {options['type']!r}" for tower, options in plugins.items())
        raise UserError(f"{to!r} cannot hold a tower of another type ({types}); write to 'safetensors'.")
    tokens, length = tokenizer.load(name), config["model"]["txt"]["context_length"]
    own = name not in tokenizer.NAMES
    if to == "safetensors":
        notes, tensors = [], flatten_dict(variables, sep="/")
        keys = Preprocessing.from_dict(config, _image_tower(config).image_size).to_config()
        content: dict[str, Any] = {
            "model": config["model"], "objective": config["objective"],
            "data": {"tokenizer": vocabulary.FILE if own else name, "resample": "bicubic"} | keys["data"],
            "eval": keys["eval"],
        }  # fmt: skip
        texts = {vocabulary.FILE: epath.Path(name).read_bytes().decode()} if own else {}
    else:
        if name == "bytes":
            raise UserError(f"tokenizer 'bytes' has no files that {to!r} could read; write to 'safetensors'.")
        flat, notes = _expressible(variables, config, to)
        content, tensors = (hf if to == "hf" else open_clip).write(config, flat, tokens)
        texts = hf.beside(config) if to == "hf" else vocabulary.own_files(name, length) if own else {}
        if own and to == "open_clip":
            notes += open_clip.OWN_TOKENIZER
    folder.mkdir(parents=True, exist_ok=True)
    for old in WRITTEN:
        (folder / old).unlink(missing_ok=True)
    file, weights = {"hf": (hf.CONFIG, hf.WEIGHTS), "open_clip": (open_clip.CONFIG, open_clip.WEIGHTS),
                     "safetensors": (CONFIG, WEIGHTS)}[to]  # fmt: skip
    for beside, text in texts.items():
        (folder / beside).write_bytes(text.encode())
    tensor_files.write(folder / weights, tensors)
    (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    return notes


def _image_tower(config: Mapping[str, Any]) -> ImageTower:
    return read_group(ModelConfig, config["model"], "model", []).tower("img")


def _expressible(
    variables: Mapping[str, Any], config: Mapping[str, Any], to: str
) -> tuple[param_mapping.Flat, list[str]]:
    """What other projects have of a model, flat and unrolled, and what they have not."""
    params, model = dict(variables["params"]), config["model"]
    if "proj_img" not in params:
        raise UserError(
            f"this model has no projection to a shared space (objective {config['objective']['name']!r}), which "
            f"{to!r} needs; write to 'safetensors'."
        )
    for key, theirs in (("pool", "cls"), ("stem", "linear")):
        if (value := model["img"].get(key, theirs)) != theirs:  # runs before `stem` lack it
            raise UserError(f"model.img.{key} is {value!r}, which {to!r} does not have; write to 'safetensors'.")
    for tower in ("img", "txt"):
        blocks = params[tower]["transformer"]
        if "blocks" in blocks:
            params[tower] = params[tower] | {"transformer": unstack_blocks(blocks, model[tower]["depth"])}
    notes = []
    known = {"img", "txt", "proj_img", "proj_txt", "log_scale", "bias"}
    if left := sorted(params.keys() - known):
        notes.append(f"left out, since {to!r} has no place for them: {', '.join(left)}")
    if "bias" in params and to == "hf":
        notes.append("left out, since CLIPModel has no place for it: bias, of the sigmoid's logits")
    flat = flatten_dict({name: tree for name, tree in params.items() if name in known}, sep="/")
    return {name: np.asarray(x) for name, x in flat.items()}, notes

"""Weights from and to other projects, in NumPy alone: OpenAI's CLIP, open_clip, Hugging Face, and our own format.

A model is a pair. `config` has the groups of a run's config that a model needs, as plain dicts: "model" and
"objective"; of "data" the keys tokenizer and resample ("bicubic", for new training), of "data" and "eval" those of the
preprocessing, see `Preprocessing`. "source" has the format of the weights, and "notes", sentences on what was
assumed or is ignored. `variables` are those of `TwoTowers.apply`, fp32: {"params": ..., "batch_stats": ...}, the second
only for heads with BatchNorm.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from xclip_jax.core import imports
from xclip_jax.core.errors import UserError, check_choice
from xclip_jax.core.fields import read_group
from xclip_jax.core.run_folder import is_run
from xclip_jax.data import tokenizer
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.interop import hf, hub, open_clip, param_mapping, tensor_files, vocabulary
from xclip_jax.models.layers import unstack_blocks
from xclip_jax.models.tower import ImageTower
from xclip_jax.models.two_towers import ModelConfig, Variables
from xclip_jax.objectives import read_objective

FORMATS = ("hf", "open_clip", "safetensors")
CONFIG = "xclip_config.json"
WEIGHTS = "xclip_model.safetensors"
CLASS_NAMES = "class_names.json"
# All files that `write` may create.
WRITTEN = (
    CONFIG, WEIGHTS, CLASS_NAMES, open_clip.CONFIG, open_clip.WEIGHTS, hf.CONFIG, hf.WEIGHTS, hf.PREPROCESSOR,
    vocabulary.FILE, *vocabulary.CLIP_FILES, vocabulary.OPTIONS, vocabulary.SPECIAL,
)  # fmt: skip

# Values of the keys of `model` that the formats of other projects are written with.
_CLIPS = {
    "img.pool": "cls", "img.stem": "linear", "img.patch_bias": False, "txt.causal": True, "txt.pool": "eot",
    "project_img": True, "project_bias": False,
}  # fmt: skip


def read(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (config, variables) of weights; see the module's docstring.

    Args:
      path: a folder or a file of weights: .safetensors, or .bin, .pt and .pth as torch.save has written them since 1.6.
        Their config is read from the same folder; weights with OpenAI's names may lack it, their sizes are inferred.
        "hf:ORG/NAME[@REVISION]" is a repository of the Hugging Face Hub, see `hub.resolve`.

    Raises:
      UserError: nothing to read, files that contain more than tensors, an architecture that is not supported, or
        tensors that are missing, unknown or of another shape, by name.
    """
    file = tensor_files.find(hub.resolve(path))
    folder, where = file.parent, str(file)
    tensors, stored = tensor_files.tensors(file)
    if any(name.startswith("params/") for name in tensors):
        with _unusable_values(folder / CONFIG), imports.named_by(folder / CONFIG):
            return _read_own(tensors, folder)
    if any(name.startswith("visual.") for name in tensors):
        beside = folder / open_clip.CONFIG
        content = tensor_files.read_json(beside) if beside.exists() else None
        with _unusable_values(beside if content else file):
            config, flat = open_clip.read(tensors, stored, folder, content, where)
    elif any(name.startswith(("vision_model.", "text_model.")) for name in tensors):
        with _unusable_values(folder / hf.CONFIG):
            config, flat = hf.read(tensors, folder, tensor_files.read_json(folder / hf.CONFIG), where)
    else:
        names = ", ".join(list(tensors)[:3])
        raise UserError(
            f"{where} is not a supported CLIP: its tensors are named {names}, ...; expected names of open_clip, "
            "transformers or xclip_jax."
        )
    return config, {"params": unflatten_dict(flat, sep="/")}


@contextlib.contextmanager
def _unusable_values(file: epath.Path) -> Iterator[None]:
    """Raise a `UserError` that names `file` for whatever a value of another type, or out of its range, leads to."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} has a value that cannot be used, or does not fit the tensors ({type(error).__name__}: {error}); "
            "download or export the model again."
        ) from error


def read_classes(path: str) -> tuple[str, ...] | None:
    """Return the classes that an exported model was fine-tuned on, or None where its files name none.

    Args:
      path: a folder or a file, as in `read`.

    Raises:
      UserError: nothing to read, or a damaged file.
    """
    file = tensor_files.find(hub.resolve(path))
    if file.name != WEIGHTS:
        return None
    classes = tensor_files.read_json(file.parent / CONFIG).get("classes")
    if classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        return classes and tuple(classes)
    raise UserError(f"{file.parent / CONFIG}: classes is {classes!r}, not a list of names; export the run again.")


def _read_own(tensors: tensor_files.Tensors, folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config = tensor_files.read_json(folder / CONFIG)
    if missing := [key for key in ("model", "objective", "data") if key not in config]:
        raise UserError(f"{folder / CONFIG} has no group {missing[0]!r}; export the run again.")
    if config["data"]["tokenizer"] == vocabulary.FILE:
        config["data"]["tokenizer"] = str(folder / vocabulary.FILE)
    keys = Preprocessing.from_dict(config, _image_tower(config).image_size).to_config()
    config["data"], own = config["data"] | keys["data"], config.get("eval", {})
    prompts = {"templates": own.get("templates"), "class_names": own.get("class_names") and str(folder / CLASS_NAMES)}
    config["eval"] = {name: value for name, value in prompts.items() if value} | keys["eval"]
    config.pop("classes", None)  # see `read_classes`
    return config | {"source": {"format": "safetensors", "notes": ()}}, unflatten_dict(tensors, sep="/")


def write(
    variables: Variables,
    config: Mapping[str, Any],
    path: str,
    to: str = "safetensors",
    *,
    repository: str = "",
    classes: Sequence[str] | None = None,
) -> list[str]:
    """Write a model into the folder `path`.

    Args:
      variables, config: as `read` returns them; other keys of `config`, such as those of a run, are ignored.
      path: the folder, which is created. Files of an earlier export, in any format, are deleted first.
      to: "hf" (a CLIPModel with its processor), "open_clip", or "safetensors": ours, which loses nothing.
      repository: the id on the Hub that the files will have, "ORG/NAME", or "".
      classes: of a fine-tuned model, see `read_classes`.

    Returns:
      Sentences on what the format cannot hold.

    Raises:
      UserError: a model, tokenizer or preprocessing that the format does not have, or a run directory.
    """
    check_choice("to", to, FORMATS)
    if is_run(path):
        raise UserError(f"{path!r} is a run directory; name another folder.")
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), dict(variables))
    folder = epath.Path(path)
    name, plugins = config["data"]["tokenizer"], config["model"].get("plugins", {})
    if plugins and to != "safetensors":
        types = ", ".join(f"{tower} {options['type']!r}" for tower, options in plugins.items())
        raise UserError(f"{to!r} cannot hold a tower of another type ({types}); write to 'safetensors'.")
    tokens, length = tokenizer.load(name), config["model"]["txt"]["context_length"]
    own = name not in tokenizer.NAMES
    content: dict[str, Any]
    if to == "safetensors":
        tensors = flatten_dict(variables, sep="/")
        content, texts, notes = _own_config(config, classes)
    else:
        if name == "bytes":
            raise UserError(f"tokenizer 'bytes' has no files that {to!r} could read; write to 'safetensors'.")
        flat, notes = _expressible(variables, config, to)
        if to == "hf":
            content, tensors = hf.write(config, flat, tokens)
        else:
            content, tensors = open_clip.write(config, flat, tokens, repository)
        texts = hf.beside(config) if to == "hf" else vocabulary.own_files(name, length) if own else {}
        if own and to == "open_clip":
            notes += open_clip.OWN_TOKENIZER[: 1 if repository else None]
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


def _own_config(
    config: Mapping[str, Any], classes: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Content of our own config file, texts of files beside it by name, and notes, see `write`."""
    keys = Preprocessing.from_dict(config, _image_tower(config).image_size).to_config()
    name, texts, notes = config["data"]["tokenizer"], {}, []
    if name not in tokenizer.NAMES:
        texts[vocabulary.FILE], name = epath.Path(name).read_bytes().decode(), vocabulary.FILE
    own = config.get("eval", {})
    prompts: dict[str, Any] = {"templates": list(own["templates"])} if own.get("templates") else {}
    if own.get("class_names"):
        names = epath.Path(own["class_names"]).expanduser()
        if names.exists():
            texts[CLASS_NAMES], prompts["class_names"] = names.read_bytes().decode(), CLASS_NAMES
        else:
            notes.append(f"left out, since it does not exist: {names}, the names of own classes (eval.class_names)")
    content = {
        "model": config["model"], "objective": config["objective"],
        "data": {"tokenizer": name, "resample": "bicubic"} | keys["data"], "eval": prompts | keys["eval"],
    }  # fmt: skip
    return content | ({"classes": list(classes)} if classes else {}), texts, notes


def _image_tower(config: Mapping[str, Any]) -> ImageTower:
    return read_group(ModelConfig, config["model"], "model", []).tower("img")


def _expressible(variables: Variables, config: Mapping[str, Any], to: str) -> tuple[param_mapping.Flat, list[str]]:
    """The parameters of a model that a format of another project can hold, flat and unrolled; and notes on the others.

    Raises:
      UserError: the format does not have the model's embedding space or image tower.
    """
    params, model = dict(variables["params"]), config["model"]
    expressible = (hf if to == "hf" else open_clip).HEADS
    for key, theirs in _CLIPS.items():
        node: Any = model
        for part in key.split("."):
            node = node.get(part, theirs)  # towers of other packages lack some
        if node != theirs:
            raise UserError(f"model.{key} is {node!r}, which {to!r} does not have; write to 'safetensors'.")
    objective = read_objective(config["objective"])
    if lacking := sorted(hf.HEADS - params.keys()):
        raise UserError(
            f"a model of objective {objective.name!r} has no shared embedding space, which {to!r} needs: it lacks "
            f"{', '.join(lacking)}; write to 'safetensors'."
        )
    for tower in ("img", "txt"):
        blocks = params[tower]["transformer"]
        if "blocks" in blocks:
            params[tower] = params[tower] | {"transformer": unstack_blocks(blocks, model[tower]["depth"])}
    notes, held = [], {"img", "txt"} | expressible
    if missing := sorted(params.keys() - held):
        notes.append(f"left out, since {to!r} has no place for them: {', '.join(missing)}")
        notes += objective.export_notes(missing)
    flat = flatten_dict({name: tree for name, tree in params.items() if name in held}, sep="/")
    return {name: np.asarray(x) for name, x in flat.items()}, notes

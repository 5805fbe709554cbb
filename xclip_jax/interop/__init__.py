"""Read and write weights as NumPy arrays: OpenAI's CLIP, open_clip, Hugging Face transformers, and our format.

A model is a pair (config, variables). `config` contains the required groups of a run's config as plain dicts: "model",
"objective", and in "data" and "eval" the tokenizer, resample ("bicubic", for new training) and the keys of
`Preprocessing`. Its group "source" contains the format of the weights, notes on assumptions and ignored values, and the
"classes" of a model fine-tuned here.
`variables`, the input of `TwoTowers.apply`, are fp32: "params", and "batch_stats" for heads with BatchNorm.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from xclip_jax.core import imports
from xclip_jax.core.errors import UserError, check_choice, describe, first_line
from xclip_jax.core.fields import read_group
from xclip_jax.core.outputs import check_folder
from xclip_jax.core.storage import write_whole
from xclip_jax.data import tokenizer
from xclip_jax.data.images import DECODINGS, WHITE
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.interop import hf, hub, open_clip, tensor_files, vocabulary
from xclip_jax.interop.names import Flat
from xclip_jax.models.transformer import unstack_blocks
from xclip_jax.models.two_towers import ModelConfig, Variables
from xclip_jax.objectives import read_objective

__all__ = ["FORMATS", "read", "write"]

FORMATS = ("hf", "open_clip", "safetensors")
CONFIG = "xclip_config.json"
WEIGHTS = "xclip_model.safetensors"
# All files that `write` may create, and one that transformers would prefer to them.
WRITTEN = (
    CONFIG, WEIGHTS, open_clip.CONFIG, open_clip.WEIGHTS, hf.CONFIG, hf.WEIGHTS, hf.PREPROCESSOR, hf.PROCESSOR,
    vocabulary.FILE, *vocabulary.CLIP_FILES, vocabulary.OPTIONS, vocabulary.SPECIAL,
)  # fmt: skip

# Keys of `model` and their values in the formats of other projects.
_CLIP_STYLES = ("xclip", "openai", "tanh")
_CLIPS: dict[str, tuple[Any, ...]] = {
    "img.pool": ("cls",), "img.style": _CLIP_STYLES, "txt.style": _CLIP_STYLES,
    "txt.causal": (True,), "txt.pool": ("eot",),
}  # fmt: skip


def read(place: str | hub.Place) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (config, variables) of weights; see the module's docstring.

    Args:
      place: a folder, a file (.safetensors; .bin, .pt and .pth by torch.save since 1.6) or "hf:ORG/NAME[@REVISION]" of
        the Hugging Face Hub, see `hub.locate`. The config is read from the same folder; OpenAI's archives need none.

    Raises:
      UserError: nothing to read, files that contain more than tensors, an unsupported architecture, or missing,
        unknown or misshapen tensors, listed by name.
    """
    file = tensor_files.find(str(hub.locate(place).path))
    folder = file.parent
    tensors = tensor_files.tensors(file)
    if any(name.startswith("params/") for name in tensors):
        with _named(file, CONFIG), imports.named_by(folder / CONFIG):
            return _read_own(tensors, folder)
    if any(name.startswith("visual.") for name in tensors):
        with _named(file, open_clip.CONFIG):
            config, flat = open_clip.read(tensors, folder)
    elif any(name.startswith(("vision_model.", "text_model.")) for name in tensors):
        with _named(file, hf.CONFIG):
            config, flat = hf.read(tensors, folder)
    else:
        names = ", ".join(list(tensors)[:3])
        raise UserError(
            f"{file} is not a supported CLIP: its tensors are named {names}, ...; expected names of open_clip, "
            "transformers or xclip_jax."
        )
    return config, {"params": unflatten_dict(flat, sep="/")}


@contextlib.contextmanager
def _named(file: epath.Path, config: str) -> Iterator[None]:
    """Name `file` in errors, also in errors caused by values of a wrong type or out of range in its `config`."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        fault = describe(error).removesuffix(".")
        if not isinstance(error, UserError):
            fault = f"{config} has a value that cannot be used, or does not fit the tensors ({first_line(error)})"
        raise UserError(f"{file}: {fault}.") from error


def _read_own(tensors: tensor_files.Tensors, folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config = tensor_files.read_json(folder / CONFIG)
    if config["data"]["tokenizer"] == vocabulary.FILE:
        config["data"]["tokenizer"] = str(folder / vocabulary.FILE)
    preparation = _preparation(config)
    config["data"] |= preparation["data"]
    config["eval"] = preparation["eval"]
    source: dict[str, Any] = {"format": "safetensors", "notes": ()}
    classes = config.pop("classes", None)
    if classes:
        source["classes"] = tuple(classes)
    return config | {"source": source}, unflatten_dict(tensors, sep="/")


def write(
    variables: Variables,
    config: Mapping[str, Any],
    path: str,
    to: str = "safetensors",
    *,
    classes: Sequence[str] | None = None,
) -> list[str]:
    """Write a model into the folder `path`.

    Args:
      variables: the model's variables, see `read`.
      config: the model's config, see `read`; other keys, such as a run's, are ignored.
      path: the folder to create; with "safetensors" also one of an earlier model, which is replaced.
      to: "hf" (a CLIPModel with its processor), "open_clip", or "safetensors" (our format, which loses nothing).
      classes: classes of a fine-tuned model.

    Returns:
      Notes on parts of the model that the format cannot store.

    Raises:
      UserError: the format does not support the model, tokenizer or preprocessing, or `path` has other files.
    """
    check_choice("to", to, FORMATS)
    folder = check_folder("path", path, lambda: to == "safetensors" and has_own(path))
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), dict(variables))
    notes = []
    if to == "safetensors":
        weights = WEIGHTS
        tensors = flatten_dict(variables, sep="/")
        texts = _own_texts(config, classes)
    else:
        fault = _find_unsupported(config, variables["params"])
        if fault:
            raise UserError(f"{fault}, which {to!r} does not support; write to 'safetensors'.")
        project = hf if to == "hf" else open_clip
        weights = project.WEIGHTS
        kept = {"img", "txt", *project.HEADS}
        flat = _unrolled({name: tree for name, tree in variables["params"].items() if name in kept}, config)
        tensors, texts = project.write(config, flat)
        notes = _left_out(config, sorted(variables["params"].keys() - kept), to)
    folder.mkdir(parents=True, exist_ok=True)
    tensor_files.write(folder / weights, tensors)  # if it fails, an earlier export is still there
    for name, text in texts.items():
        write_whole(folder / name, text)
    return notes


def has_own(path: str | os.PathLike) -> bool:
    """Whether a folder has a model that `write` wrote to "safetensors", perhaps interrupted."""
    folder = epath.Path(path).expanduser()
    return any((folder / name).exists() for name in (CONFIG, WEIGHTS))


def _own_texts(config: Mapping[str, Any], classes: Sequence[str] | None) -> dict[str, str]:
    preparation = _preparation(config)
    name = config["data"]["tokenizer"]
    texts = {}
    if name not in tokenizer.NAMES:
        texts[vocabulary.FILE] = tokenizer.read_file(name).decode()
        name = vocabulary.FILE
    content = {
        "model": config["model"], "objective": config["objective"],
        "data": {"tokenizer": name, "resample": "bicubic"} | preparation["data"], "eval": preparation["eval"],
    }  # fmt: skip
    if classes:
        content["classes"] = list(classes)
    return texts | {CONFIG: tensor_files.json_text(content)}


def _preparation(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the keys of "data" and "eval" for images and prompts."""
    size = read_group(ModelConfig, config["model"], "model", []).tower("img").image_size
    keys = Preprocessing.from_dict(config, size).to_config()
    templates = config.get("eval", {}).get("templates")
    return keys | {"eval": ({"templates": list(templates)} if templates else {}) | keys["eval"]}


def _find_unsupported(config: Mapping[str, Any], params: Mapping[str, Any]) -> str:
    """Return a feature of the model that only our format supports, or ""."""
    model = config["model"]
    plugins = model.get("plugins", {})
    if plugins:
        return ", ".join(f"the {tower} tower is of type {options['type']!r}" for tower, options in plugins.items())
    if config["data"]["tokenizer"] != "clip":
        return f"the tokenizer is {config['data']['tokenizer']!r}"
    for key, allowed in _CLIPS.items():
        tower, _, name = key.partition(".")
        if model[tower][name] not in allowed:
            return f"model.{key} is {model[tower][name]!r}"
    objective = read_objective(config["objective"])
    trained = objective.similarities and not objective.similarities[0].is_distribution
    if not trained or not params.keys() >= hf.HEADS:
        return f"objective {objective.name!r} trains no shared embedding space"
    return ""


def _left_out(config: Mapping[str, Any], heads: Sequence[str], to: str) -> list[str]:
    parts = [", ".join(heads)] if heads else []
    name = config["data"].get("decoding", "open_clip")
    ours = DECODINGS[name]
    theirs = DECODINGS["transformers" if to == "hf" else "open_clip"]
    steps = []
    if ours["background"] != theirs["background"]:
        white = ours["background"] == WHITE
        steps.append(
            "lay transparent images on white" if white else "drop the alpha channel, as Image.convert('RGB') does"
        )
    if ours["rotate"]:
        steps.append("rotate images by their EXIF tag, as PIL.ImageOps.exif_transpose does")
    if steps:
        parts.append(f"data.decoding={name!r}; {' and '.join(steps)}, before they are resized")
    return [f"not stored, because {to!r} has no field for it: {part}" for part in parts]


def _unrolled(params: Mapping[str, Any], config: Mapping[str, Any]) -> Flat:
    params = dict(params)
    for tower in ("img", "txt"):
        blocks = params[tower]["transformer"]
        if "blocks" in blocks:
            params[tower] = params[tower] | {"transformer": unstack_blocks(blocks, config["model"][tower]["depth"])}
    return {name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}

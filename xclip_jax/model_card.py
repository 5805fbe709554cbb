"""The README of exported weights: what the model is, what it learned from and how, what is known of it and what not."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from xclip_jax import environment
from xclip_jax.config.schema import Config
from xclip_jax.evaluators import results, summary
from xclip_jax.train.build import Parts

_LIBRARIES = {"hf": "transformers", "open_clip": "open_clip", "safetensors": "xclip_jax"}
# Run beside the folder {out}, with a picture and texts of the reader's.
_USE = {
    "hf": """\
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

model = CLIPModel.from_pretrained("{out}").eval()
tokenizer = AutoTokenizer.from_pretrained("{out}")
processor = CLIPImageProcessor.from_pretrained("{out}")
pixels = processor(Image.open("picture.jpg"), return_tensors="pt")
tokens = tokenizer(["a photo of a cat", "a photo of a dog"], padding="max_length", truncation=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**pixels, **tokens).logits_per_image
print(logits.softmax(dim=-1))""",
    "open_clip": """\
import open_clip
import torch
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("local-dir:{out}")
tokenizer = open_clip.get_tokenizer("local-dir:{out}")
pixels = preprocess(Image.open("picture.jpg")).unsqueeze(0)
tokens = tokenizer(["a photo of a cat", "a photo of a dog"])
with torch.no_grad():
    logits, _ = model.eval().get_logits(pixels, tokens)
print(logits.softmax(dim=-1))""",
    "safetensors": """\
import xclip_jax

model = xclip_jax.load("{out}")
result = model.zero_shot(["picture.jpg"], ["cat", "dog"])
print(result.labels, result.probabilities)""",
}
_RECIPE = ("data.batch", "optim.lr", "optim.schedule", "optim.warmup", "optim.weight_decay", "optim.b1",
           "optim.b2", "optim.grad_clip_norm", "data.crop_scale", "data.resample", "data.flip_prob",
           "data.color_jitter", "model.img.patch_dropout", "model.dtype", "seed")  # fmt: skip


def render(
    source: str,
    out: str,
    to: str,
    config: Config,
    parts: Parts,
    at: int,
    notes: Sequence[str],
    *,
    run: bool,
) -> str:
    """Markdown.

    Args:
      source: what was exported: a run's folder (`run`), or weights of another project.
      out: the folder that the card is for.
      to: format of the weights there.
      config, parts, at: of the source, as `weights.load` gives them.
      notes: sentences on what the format could not hold.
      run: whether data, recipe and results can be looked up in `source`.
    """
    folder = epath.Path(source)
    sections = [
        _head(config, to),
        _model(config, parts),
        _input(config, parts, to),
        f"## Use\n\n```python\n{_USE[to].format(out=epath.Path(out).name)}\n```" + "".join(f"\n\n* {n}" for n in notes),
    ]
    if run:
        sections += [_data(folder, config), _recipe(folder, parts, at), _results(folder, config, at)]
    else:
        sections.append(f"## Data, recipe, results\n\nConverted from `{source}`; see what is said of it there.")
    sections += [_limits(config), _licence(), _made(folder if run else None)]
    return "\n\n".join(sections) + "\n"


def _rows(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _head(config: Config, to: str) -> str:
    name = config.objective.name
    return (
        f"---\nlicense: unknown\nlibrary_name: {_LIBRARIES[to]}\npipeline_tag: zero-shot-image-classification\n"
        f"tags:\n- {name}\n- xclip_jax\n---\n\n"
        f"# {name}, {config.model.tower('img').describe()}\n\n"
        "Images and texts in one space, learned from pairs of them."
    )


def _model(config: Config, parts: Parts) -> str:
    count = sum(x.size for x in jax.tree.leaves(parts.abstract.params))
    towers = {"image": parts.model.img.facts(), "text": parts.model.txt.facts()}
    towers["text"]["sees"] += f" of {parts.tokenizer.vocab_size:,}"
    head = list(dict.fromkeys(key for facts in towers.values() for key in facts if key != "sees"))
    rows = [[name, *(facts.get(key, "") for key in [*head, "sees"])] for name, facts in towers.items()]
    embed = config.model.embed if "z_img" in parts.model.outputs else "no"
    return (
        f"## Model\n\n{count:,} parameters in training, heads included; embeddings of {embed} "
        f"dimensions.\n\n{_rows(['tower', *head, 'sees'], rows)}"
    )


def _input(config: Config, parts: Parts, to: str) -> str:
    """How images and texts become what the towers take."""
    prepare, name, length = parts.preprocessing, config.data.tokenizer, parts.context_length
    if name == "clip":
        tokens = "lower case, CLIP's byte-pair encoding"
        tokens += {
            "hf": "; training also repaired broken encodings and resolved HTML entities, which transformers leaves",
        }.get(to, ", after broken encodings are repaired and HTML entities resolved")
    elif name == "bytes":
        tokens = "the bytes of UTF-8 plus 3, with 1 in front, 2 at the end and 0 behind"
    else:
        cleaned = "; open_clip cleans the text before" if to == "open_clip" else ""
        tokens = f"`tokenizer.json` of this folder, which the model was trained with{cleaned}"
    mean, std = (", ".join(map(str, values)) for values in (prepare.mean, prepare.std))
    return (
        f"## Input\n\n* Images: {prepare.resizing}, {prepare.size} x {prepare.size} pixels; values from 0 to 1, less "
        f"the mean ({mean}), divided by the deviation ({std}).\n"
        f"* Texts: {tokens}. At most {length} tokens, start and end included; longer texts are cut."
    )


def _read(path: epath.Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _data(folder: epath.Path, config: Config) -> str:
    cards = _read(folder / "data.json")
    if cards is None:
        return "## Data\n\nUnknown: the run has no data.json."
    shares = config.data.weights or ("by size",) * len(cards)
    rows = [
        (f"`{spec}`", f"{card['samples']:,}", share, f"`{card['hash']}`" if card.get("hash") else "none")
        for spec, card, share in zip(config.data.sources, cards, shares, strict=True)
    ]
    said = f"Of each pair one caption of {', '.join(config.data.text_keys)} is drawn"
    if config.data.tags:
        said += f", with up to {config.data.tags} keywords of {config.data.tags_key}"
    return f"## Data\n\n{_rows(('source', 'pairs', 'share', 'hash of the files'), rows)}\n\n{said}."


def _recipe(folder: epath.Path, parts: Parts, at: int) -> str:
    # The file's: `weights.load` sets batch and layout to those of this machine.
    config = _read(folder / "config.json")["config"]
    init = config.get("init", {"weights": "", "frozen": ()})

    def value(key: str) -> Any:
        found: Any = config
        for part in key.split("."):
            found = found[part]
        return found

    objective = config["objective"]
    rows = [("objective.name", objective["name"])]
    rows += [(f"objective.terms.{key}", weight) for key, weight in objective["terms"].items()]
    rows += parts.objective.recipe(parts.config.model).items()
    rows += [("step", f"{at:,} of {config['steps']:,}")]
    averaged = config["eval"]["ema"] and (config["ema"]["on"] or parts.objective.teacher)
    rows.append(("parameters", "their moving average" if averaged else "those of the last update"))
    plugins = parts.config.model.plugins
    unused = tuple(f"model.{name}." for name in plugins)
    rows += [(key, value(key)) for key in _RECIPE if not key.startswith(unused)]
    rows += [(f"model.plugins.{name}.{key}", x) for name, options in plugins.items() for key, x in options.items()]
    if init["weights"]:
        rows.append(("init.weights", init["weights"]))
    if init["frozen"]:
        rows.append(("init.frozen", ", ".join(init["frozen"])))
    return f"## Recipe\n\n{_rows(('key', 'value'), rows)}"


def _results(folder: epath.Path, config: Config, at: int) -> str:
    lines = ["## Results"]
    last, evaluation = _read(folder / "results.json"), folder / "evaluation.json"
    if last and last["results"] and at == config.steps:
        lines.append(f"At the end of training, in percent:\n\n```\n{summary.render(results.of_run(last))}\n```")
    entries = results.read(evaluation)[0] if evaluation.exists() else []
    if entries := [entry for entry in entries if entry["step"] == at]:
        shown, _ = results.latest(entries)
        rows = [
            (r["set"], r["metric"], f"{r['value']:.1f}", f"{r['n']:,}", r.get("protocol", ""), r.get("templates", ""))
            for r in shown
        ]
        head = ("set", "metric", "value", "n", "protocol", "templates")
        lines.append(f"By `python -m xclip_jax.evaluate`, profile {shown[-1]['profile']}:\n\n{_rows(head, rows)}")
    if len(lines) == 1:
        lines.append("None: this checkpoint was not evaluated.")
    return "\n\n".join(lines)


def _limits(config: Config) -> str:
    size, length, mode = (
        config.model.tower("img").image_size,
        config.model.tower("txt").context_length,
        config.eval.resize,
    )
    view = {"shortest": "its central square", "squash": "a whole that is squashed to a square",
            "longest": "a whole with black borders"}[mode]  # fmt: skip
    return (
        "## Limits\n\n"
        f"* An image is seen as {view} at {size} x {size} pixels, a text as its first {length} tokens.\n"
        "* Scores compare texts or images with one another. They are no probabilities that something is so: the best "
        "of the given texts wins even where none of them is right.\n"
        "* It knows the languages, styles and things of its training pairs, with their errors and prejudices, which "
        "have not been measured beyond the results above.\n"
        "* Not meant for decisions about people, for surveillance, or where a mistake does harm."
    )


def _licence() -> str:
    return (
        "## Licence\n\nNone is stated for these weights; who publishes them must choose one (`license:` above). The "
        "licence of the training data: see its sources. The code, xclip_jax, is under Apache-2.0."
    )


def _made(folder: epath.Path | None) -> str:
    def lines(name: str, environment: Mapping[str, Any]) -> Iterator[str]:
        versions = ", ".join(f"{key} {value}" for key, value in environment["versions"].items())
        yield f"* {name}: `{environment['command']}`, commit `{environment['commit']}`, on {environment['devices']}"
        yield f"  with Python {environment['python']}, {versions}"

    found = list(lines("exported", environment.capture()))
    trained = folder and _read(folder / "config.json").get("environment")
    return "## Made by\n\n" + "\n".join([*(lines("trained", trained) if trained else ()), *found])

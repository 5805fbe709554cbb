"""Model card, the README of exported weights: architecture, preprocessing, data, recipe, results and limits."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core import environment, hub_client
from xclip_jax.core.errors import public
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.data import images
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators import results, tables
from xclip_jax.evaluators.results import Result
from xclip_jax.objectives import make_objective
from xclip_jax.train.build import Experiment

_LIBRARIES = {"hf": "transformers", "open_clip": "open_clip", "safetensors": "xclip_jax"}
# What a library writes before a folder, and before a repository of the Hub.
_PREFIXES = {"hf": ("", ""), "open_clip": ("local-dir:", "hf-hub:"), "safetensors": ("", "hf:")}
# To run beside the folder {out}, or anywhere for a repository.
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
import open_clip  # 3.0 or later
import torch
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("{out}")
tokenizer = open_clip.get_tokenizer("{out}")
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
# Of a fine-tuned model: to run beside the folder too, with labelled items.
_USE_LABELLED = "```\nxclip-jax evaluate --checkpoint {out} --suite finetuned/{source}\n```"
# Of the Hub and of clip_benchmark, by family of results.
_TASKS = {
    "zeroshot": "zero-shot-image-classification",
    "retrieval": "zero-shot-retrieval",
    "visual": "image-classification",
}
_RECIPE = ("data.batch", "optim.lr", "optim.schedule", "optim.warmup", "optim.weight_decay", "optim.b1",
           "optim.b2", "optim.grad_clip_norm", "data.crop_scale", "data.resample", "data.flip_prob",
           "data.color_jitter", "model.img.patch_dropout", "model.dtype", "seed")  # fmt: skip
_SHOWN_CLASSES = 20
# Paths from a root and addresses of buckets, in specs and in words of a command.
_PATH = re.compile(r"""(?:^|(?<=[\s=:@,;("'\[]))(?:~[\w.-]*/|/(?![/\s]|$)|(?!https?:)\w+://)[^"',;)\]]*""")


def render(
    source: str,
    out: str,
    to: str,
    experiment: Experiment,
    step: int,
    notes: Sequence[str],
    *,
    run: bool,
    repository: str = "",
) -> str:
    """Return the card in Markdown, without paths of this machine: of each the last part is left.

    Args:
      source: path of what was exported: a run directory (`run`), or weights of another project.
      out: the folder of the card.
      to: format of the weights in it.
      experiment, step: of the source, as `weights.load` returns them.
      notes: sentences on what the format cannot hold.
      run: whether `source` is a run directory, with data, recipe and results.
      repository: the card's id on the Hub, "ORG/NAME", or "": the code in it then names the folder.
    """
    config = experiment.config
    folder = RunFolder(source) if run else None
    measured = _measured(folder, config.steps, step) if folder else []
    sections = [
        _metadata(config, experiment, to, measured) + _head(config, experiment),
        _model(config, experiment),
        _input(config, experiment, to),
        f"## Use\n\n{_usage(experiment, to, epath.Path(out).name, repository)}" + "".join(f"\n\n* {n}" for n in notes),
    ]
    if folder:
        sections += [_data(folder, experiment), _recipe(folder, step), _results(folder, config.steps, step)]
    else:
        sections.append(f"## Data, recipe, results\n\nConverted from {_code(_public(source))}; see its documentation.")
    sections += [_limits(experiment), _licence(), _made(folder)]
    return "\n\n".join(sections) + "\n"


def _public(text: str) -> str:
    """Return a spec, a path or a word without the folders of its paths, and without secrets of its addresses.

    Of a pattern the last folder stays.
    """

    def last(match: re.Match[str]) -> str:
        *folders, name = match[0].rstrip("/").split("/")
        return "/".join([*folders[-1:], name] if re.search(r"[*?\[{]", name) and folders[1:] else [name])

    return _PATH.sub(last, public(text))


def _sets(names: Iterable[str]) -> dict[str, str]:
    """Return {set: its name in a card}."""
    return {name: _public(short) for name, short in tables.shorten(names).items()}


def _code(text: str) -> str:
    """Return text of others, such as the name of a class, as code: Markdown takes nothing in it for HTML or a link."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _words(text: str) -> str:
    """Return words in one line, in which Markdown finds no HTML, link or code."""
    return re.sub(r"[\\`\[]", r"\\\g<0>", " ".join(text.split())).replace("<", "&lt;")


def _usage(experiment: Experiment, to: str, folder: str, repository: str) -> str:
    local, remote = _PREFIXES[to]
    out = f"{remote}{repository}" if repository else f"{local}{folder}"
    if experiment.objective.labelled:
        source = "folder:PATH" if experiment.objective.towers == ("img",) else "glue:TASK@PATH/validation"
        return _USE_LABELLED.format(out=out, source=source)
    return f"```python\n{_USE[to].format(out=out)}\n```"


def _rows(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _metadata(config: Config, experiment: Experiment, to: str, measured: Sequence[Result]) -> str:
    """Return what the Hub reads, in YAML; where huggingface_hub is installed with the results, as its model-index."""
    task = "image-classification" if experiment.objective.labelled else "zero-shot-image-classification"
    names: dict[str, Any] = {"license": "unknown", "library_name": _LIBRARIES[to], "pipeline_tag": task}
    tags = [config.objective.name, "xclip_jax"]
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError:
        lines = [f"{key}: {value}" for key, value in names.items()] + ["tags:", *(f"- {tag}" for tag in tags)]
        return "\n".join(["---", *lines, "---\n\n"])
    of_hub = re.compile(rf"(?:^|[/:])hf:(?!\.)({hub_client.ID})")
    shown = _sets(result.set for result in measured)
    rows = [
        EvalResult(
            task_type=_TASKS.get(result.family, result.family),
            dataset_type=match[1] if (match := of_hub.search(result.set)) else shown[result.set],
            dataset_name=shown[result.set],
            # The Hub puts results of one type and configuration under one name: a set is its own configuration.
            dataset_config=shown[result.set],
            metric_type=result.key,
            metric_value=round(result.value, 2),
        )
        for result in measured
    ]
    index: dict[str, Any] = {"model_name": experiment.objective.title, "eval_results": rows} if rows else {}
    return f"---\n{ModelCardData(**names, tags=tags, **index).to_yaml()}\n---\n\n"


def _measured(run: RunFolder, steps: int, step: int) -> list[Result]:
    """Headline results of the checkpoint: of `evaluate` where there are any, else those at the end of training."""
    values = results.of_entries(_entries(run, step))
    if not values and step == steps:
        values = results.from_json((run.read_results() or {"records": []})["records"])
    return [result for result in values if result.headline]


def _entries(run: RunFolder, step: int) -> list[results.Entry]:
    """Entries of evaluation.json for the checkpoint, of the profile that was evaluated last."""
    entries = results.read(run.evaluation_file)[0] if run.evaluation_file.exists() else []
    entries = [entry for entry in results.of_config(entries, _run_config(run)) if entry["step"] == step]
    return results.latest(entries)[0] if entries else []


def _head(config: Config, experiment: Experiment) -> str:
    objective = experiment.objective
    outputs = " and ".join(objective.describe(config.model))
    return (
        f"# {objective.title}, {config.model.tower('img').describe()}\n\n"
        f"Trained on {'labelled items' if objective.labelled else 'image-text pairs'}; gives "
        f"{outputs or 'features of images and texts'}."
    )


def _model(config: Config, experiment: Experiment) -> str:
    count = sum(x.size for x in jax.tree.leaves(experiment.abstract.params))
    towers = {
        title: getattr(experiment.model, name).facts()
        for name, title in (("img", "image"), ("txt", "text"))
        if name in experiment.objective.towers
    }
    if "text" in towers:
        towers["text"]["input"] += f" of {experiment.tokenizer.vocab_size:,}"
    head = list(dict.fromkeys(key for facts in towers.values() for key in facts if key != "input"))
    rows = [[name, *(facts.get(key, "") for key in [*head, "input"])] for name, facts in towers.items()]
    table = _rows(["tower", *head, "input"], rows)
    return f"## Model\n\n{count:,} parameters in training, heads included.\n\n{table}"


def _input(config: Config, experiment: Experiment, to: str) -> str:
    """How images and texts become what the towers take."""
    prepare, name, length = experiment.preprocessing, config.data.tokenizer, experiment.context_length
    if name == "clip":
        tokens = "lower case, CLIP's byte-pair encoding"
        tokens += {
            "hf": "; training also repaired broken encodings and resolved HTML entities, which transformers does not",
        }.get(to, ", after broken encodings are repaired and HTML entities resolved")
    elif name == "bytes":
        tokens = "the bytes of UTF-8 plus 3, with 1 before, 2 after and 0 for padding"
    else:
        cleaned = "; open_clip also cleans the text first" if to == "open_clip" else ""
        tokens = f"`tokenizer.json` of this folder, with which the model was trained{cleaned}"
    mean, std = (", ".join(map(str, values)) for values in (prepare.mean, prepare.std))
    lines = {
        "img": f"* Images: {prepare.resizing}, {prepare.size} x {prepare.size} pixels; values from 0 to 1, minus "
        f"the mean ({mean}), divided by the standard deviation ({std}). {_transparency(prepare, to)}",
        "txt": f"* Texts: {tokens}. At most {length} tokens, start and end included; longer texts are cut.",
    }
    return "## Input\n\n" + "\n".join(lines[tower] for tower in experiment.objective.towers)


def _transparency(prepare: Preprocessing, to: str) -> str:
    if prepare.background == images.DROPPED:
        return "The alpha channel of transparent images is dropped."
    before = "" if to == "safetensors" else f", which {_LIBRARIES[to]} does not do: do so before"
    return f"Transparent images are laid on white before they are resized{before}."


def _data(run: RunFolder, experiment: Experiment) -> str:
    config, labelled = experiment.config, experiment.objective.labelled
    sources = run.read_sources()
    if sources is None:
        return "## Data\n\nUnknown: the run has no data.json."
    shares = config.data.weights or ("by size",) * len(sources)
    rows = [
        (_code(_public(spec)), f"{source['samples']:,}", share, _code(source["hash"]) if source.get("hash") else "none")
        for spec, source, share in zip(config.data.sources, sources, shares, strict=True)
    ]
    head = ("source", "items" if labelled else "pairs", "share", "hash of the files")
    text = f"Of each pair one caption of {', '.join(map(_words, config.data.text_keys))} is drawn"
    if labelled:
        names = run.read_classes() or ()
        more = f" and {len(names) - _SHOWN_CLASSES:,} more" if len(names) > _SHOWN_CLASSES else ""
        shown = ", ".join(map(_code, names[:_SHOWN_CLASSES]))
        text = f"Classes: {shown}{more}" if names else "The data name no classes"
    elif config.data.tags:
        text += f", with up to {config.data.tags} keywords of {_words(config.data.tags_key)}"
    return f"## Data\n\n{_rows(head, rows)}\n\n{text}."


def _recipe(run: RunFolder, step: int) -> str:
    # That of the file: `weights.load` sets batch and layout to those of this machine.
    config = _run_config(run)
    objective, values = make_objective(config.objective), schema.flatten(schema.to_dict(config))
    averaged = config.eval.ema and (config.ema.on or objective.teacher)
    rows = [("objective.name", objective.name), *objective.recipe(config.model).items()]
    rows.append(("step", f"{step:,} of {config.steps:,}"))
    rows.append(("parameters", "their moving average" if averaged else "those of the last update"))
    plugins = config.model.plugins
    unused = tuple(f"model.{name}." for name in plugins)
    rows += [(key, values[key]) for key in _RECIPE if not key.startswith(unused)]
    rows += [(f"model.plugins.{name}.{key}", x) for name, options in plugins.items() for key, x in options.items()]
    if config.init.weights:
        rows.append(("init.weights", config.init.weights))
    if config.init.frozen:
        rows.append(("init.frozen", ", ".join(config.init.frozen)))
    rows = [(key, _words(_public(value)) if isinstance(value, str) else value) for key, value in rows]
    return f"## Recipe\n\n{_rows(('key', 'value'), rows)}"


def _run_config(run: RunFolder) -> Config:
    return schema.resolve(schema.complete((run.read_config() or {})["config"]))


def _results(run: RunFolder, steps: int, step: int) -> str:
    lines = ["## Results"]
    last = run.read_results()
    if last and last["results"] and step == steps:
        table = tables.render(results.from_json(last["records"])).replace("`", "'")
        lines.append(f"At the end of training, in percent:\n\n```\n{table}\n```")
    if shown := _entries(run, step):
        names = _sets(r["set"] for r in shown)
        rows = [
            (
                _code(names[r["set"]]),
                r["metric"],
                f"{r['value']:.1f}",
                f"{r['n']:,}",
                _words(r.get("protocol", "")),
                _words(r.get("templates", "")),
            )
            for r in shown
        ]
        head = ("set", "metric", "value", "n", "protocol", "templates")
        lines.append(f"By `xclip-jax evaluate`, profile {shown[-1]['profile']}:\n\n{_rows(head, rows)}")
    if len(lines) == 1:
        lines.append("None: this checkpoint was not evaluated.")
    return "\n\n".join(lines)


def _limits(experiment: Experiment) -> str:
    config, objective = experiment.config, experiment.objective
    view = {
        "shortest": "cropped to its central square",
        "squash": "resized to a square without cropping",
        "longest": "padded to a square with black",
    }[config.eval.resize]
    size, length = experiment.image_size, experiment.context_length
    inputs = {
        "img": f"an image is {view}, {size} x {size} pixels",
        "txt": f"a text is cut to its first {length} tokens",
    }
    cut = "; ".join(inputs[tower] for tower in objective.towers)
    scores = (
        "Scores compare texts or images with one another. They are not probabilities that a text is true of an image: "
        "the best of the given texts wins even where none of them is right."
    )
    if objective.labelled:
        scores = "It gives every item a class that it was trained on, or a number in their range, whatever the item is."
    return (
        "## Limits\n\n"
        f"* {cut[0].upper()}{cut[1:]}.\n"
        f"* {scores}\n"
        f"* Its training {'items' if objective.labelled else 'pairs'} decide which languages, styles and objects it "
        "knows, and its errors and biases, which have not been measured beyond the results above.\n"
        "* Not intended for decisions about people, for surveillance, or where a mistake does harm."
    )


def _licence() -> str:
    return (
        "## Licence\n\nNone is stated for these weights; their publisher must choose one (`license:` above). The "
        "licence of the training data: see its sources. The code, xclip_jax, is under Apache-2.0."
    )


def _made(run: RunFolder | None) -> str:
    def lines(name: str, facts: Mapping[str, Any]) -> Iterator[str]:
        versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
        command = " ".join(map(_public, facts["command"].split(" ")))
        yield f"* {name}: {_code(command)}, commit `{facts['commit']}`, on {facts['devices']}"
        yield f"  with Python {facts['python']}, {versions}"

    trained = (run.read_config() or {}).get("environment") if run else None
    rows = [*(lines("trained", trained) if trained else ()), *lines("exported", environment.capture())]
    return "## Made by\n\n" + "\n".join(rows)

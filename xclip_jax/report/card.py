"""Model card, the README of exported weights: the facts for the template card.md."""

import dataclasses
import importlib.resources
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from etils import epath

from xclip_jax.config import schema
from xclip_jax.core import environment, hub_client
from xclip_jax.core.errors import redact
from xclip_jax.core.run_folder import RunReader
from xclip_jax.data import images
from xclip_jax.evaluators import results, tables
from xclip_jax.evaluators.results import Result
from xclip_jax.objectives import make_objective
from xclip_jax.train.build import Experiment
from xclip_jax.train.weights import Loaded, fingerprint, run_config

_LIBRARIES = {"hf": "transformers", "open_clip": "open_clip", "onnx": "onnxruntime", "safetensors": "xclip_jax"}
# A library's prefixes for folders and for Hub repositories.
_PREFIXES = {"hf": ("", ""), "open_clip": ("local-dir:", "hf-hub:"), "onnx": ("", ""), "safetensors": ("", "hf:")}
_TASKS = {
    "zeroshot": "zero-shot-image-classification",
    "retrieval": "zero-shot-retrieval",
    "visual": "image-classification",
}
_PARTS = ("batch", "optimizer", "images", "model", "seed")  # of the recipe, in order
_SHOWN_CLASSES = 20
# Absolute paths and bucket addresses in specs and command words.
_PATH = re.compile(r"""(?:^|(?<=[\s=:@,;("'\[]))(?:~[\w.-]*/|/(?![/\s]|$)|(?!https?:)\w+://)[^"',;)\]]*""")


def render(
    source: str, out: str, to: str, loaded: Loaded, notes: Sequence[str], *, run: RunReader | None, repository: str = ""
) -> str:
    """Return the card in Markdown; paths of this machine are shortened to their last part.

    Args:
      source: directory of a run (`run`), or weights of another project.
      out, to: folder and format of the exported weights.
      loaded: the weights at `source`.
      notes: sentences on facts not expressible in the format.
      run: the run at `source`; None for other weights.
      repository: "ORG/NAME" on the Hub; "" if the card's code loads the folder.
    """
    experiment = loaded.experiment
    config = experiment.config
    objective = experiment.objective
    local, remote = _PREFIXES[to]
    trained = (run.read_config() or {}).get("environment") if run else None
    towers = {name: dataclasses.asdict(getattr(experiment.model, name)) for name in objective.towers}
    keys = dict.fromkeys(key for tower in towers.values() for key in tower)
    options = [[key, *(tower.get(key, "") for tower in towers.values())] for key in keys]
    known = measured(run, loaded) if run else []
    context = {
        "metadata": metadata(experiment, to, known),
        "experiment": experiment,
        "objective": objective,
        "labelled": objective.labelled,
        "tower": config.model.tower(objective.towers[0]).describe(),
        "towers": (["option", *({"img": "image", "txt": "text"}[name] for name in towers)], options),
        "prepare": experiment.preprocessing,
        "drops_alpha": experiment.preprocessing.background == images.DROPPED,
        "to": to,
        "library": _LIBRARIES[to],
        "tokenizer": config.data.tokenizer,
        "out": f"{remote}{repository}" if repository else f"{local}{epath.Path(out).name}",
        "notes": notes,
        "run": run,
        "source": _code(shown(source)),
        "made": ({"trained": _machine(trained)} if trained else {}) | {"exported": _machine(environment.capture())},
    }
    if run:
        context |= data(run, experiment) | {"recipe": list(_recipe(run, loaded.step)), "results": evaluations(known)}
    template = importlib.resources.files("xclip_jax.report").joinpath("card.md").read_text("utf-8")
    return jinja2.Template(template, undefined=jinja2.StrictUndefined, keep_trailing_newline=True).render(context)


def shown(text: str) -> str:
    """Return text with URLs redacted and paths shortened to their last part, or for a pattern the last two."""

    def last(match: re.Match[str]) -> str:
        *folders, name = match[0].rstrip("/").split("/")
        return "/".join([*folders[-1:], name] if re.search(r"[*?\[{]", name) and folders[1:] else [name])

    return _PATH.sub(last, redact(text))


def names_of_sets(names: Iterable[str]) -> dict[str, str]:
    """Return {set: name in a card}."""
    return {name: shown(short) for name, short in tables.shorten(names).items()}


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def in_words(text: str) -> str:
    """Return untrusted text on one line, escaped for Markdown."""
    return re.sub(r"[\\`\[]", r"\\\g<0>", " ".join(text.split())).replace("<", "&lt;")


def metadata(experiment: Experiment, to: str, headlines: Sequence[Result]) -> str:
    """Return the Hub's metadata in YAML; huggingface_hub, if installed, adds the results as a model-index."""
    task = "image-classification" if experiment.objective.labelled else "zero-shot-image-classification"
    names: dict[str, Any] = {"license": "unknown", "library_name": _LIBRARIES[to], "pipeline_tag": task}
    tags = [experiment.config.objective.name, "xclip_jax"]
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError:
        return "".join(f"{key}: {value}\n" for key, value in (names | {"tags": f"[{', '.join(tags)}]"}).items())
    of_hub = re.compile(rf"(?:^|[/:])hf:(?!\.)({hub_client.ID})")
    in_card = names_of_sets(result.set for result in headlines)
    rows = [
        EvalResult(
            task_type=_TASKS.get(result.family, result.family),
            dataset_type=next(iter(of_hub.findall(result.set)), in_card[result.set]),
            dataset_name=in_card[result.set],
            dataset_config=in_card[result.set],  # the Hub merges sets of equal type and configuration
            metric_type=result.key,
            metric_value=round(result.value, 2),
        )
        for result in headlines
    ]
    index: dict[str, Any] = {"model_name": experiment.objective.title, "eval_results": rows} if rows else {}
    return f"{ModelCardData(**names, tags=tags, **index).to_yaml()}\n"


def measured(run: RunReader, loaded: Loaded) -> list[Result]:
    """Return the loaded model's headline results of each set, the last by `evaluate`, or else by the end of training.

    The model is identified by its weights, since the run's checkpoints may have been replaced.
    """
    known = results.read(run.evaluation_file)[0] if run.evaluation_file.exists() else []
    number = fingerprint(loaded.experiment, loaded.variables) if known else ""
    entries = [entry for entry in known if entry["step"] == loaded.step and entry["fingerprint"] == number]
    values = results.read_entries(results.latest(entries)[0]) if entries else []
    if (values or not known) and loaded.step == loaded.config.steps:
        sets = {(result.family, result.set) for result in values}
        trained = results.from_json((run.read_results() or {"records": []})["records"])
        values += [result for result in trained if (result.family, result.set) not in sets]
    return [result for result in values if result.headline]


def data(run: RunReader, experiment: Experiment) -> dict[str, Any]:
    """Return a table of the sources and a sentence on captions or classes."""
    config = experiment.config
    labelled = experiment.objective.labelled
    sources = run.read_sources()
    if sources is None:
        return {"data": None}
    shares = config.data.weights or ("by size",) * len(sources)
    rows = [
        (_code(shown(spec)), f"{source['samples']:,}", share, _code(source["hash"]) if source.get("hash") else "none")
        for spec, source, share in zip(config.data.sources, sources, shares, strict=True)
    ]
    text = f"One caption of each pair is drawn, from {', '.join(map(in_words, config.data.text_columns))}"
    if labelled:
        names = run.read_classes() or ()
        text = "The data name no classes"
        if names:
            text = f"Classes, {len(names):,} in all: {', '.join(map(_code, names[:_SHOWN_CLASSES]))}"
    elif config.data.caption_transform:
        text += f", and changed by {in_words(config.data.caption_transform)}"
    if config.data.negatives:
        text += f"; {config.data.negatives} negatives, from {', '.join(map(in_words, config.data.negative_columns))}"
    head = ("source", "items" if labelled else "pairs", "share", "hash of the files")
    return {"data": (head, rows), "about_data": text}


def _recipe(run: RunReader, step: int) -> Iterator[tuple[str, Any]]:
    config = run_config(run)  # `weights.load` changes batch and layout for this machine
    objective = make_objective(config.objective)
    values = schema.flatten(schema.to_dict(config))
    plugins = config.model.plugins
    averaged = config.eval.ema and (config.ema.momentum or objective.teacher)
    rows: dict[str, Any] = {"objective.name": objective.name, **objective.recipe(config.model)}
    rows["step"] = f"{step:,} of {config.steps:,}"
    rows["parameters"] = "their moving average" if averaged else "after the last update"
    keys = [key for part in _PARTS for key in schema.keys_where(card=part)]
    rows |= {key: values[key] for key in keys if not key.startswith(tuple(f"model.{name}." for name in plugins))}
    rows |= {f"model.plugins.{name}.{key}": x for name, options in plugins.items() for key, x in options.items()}
    start = {"init.weights": config.init.weights, "init.freeze": ", ".join(config.init.freeze)}
    start["finetune.lora.rank"] = config.finetune.lora.rank
    rows |= {key: value for key, value in start.items() if value}
    for key, value in rows.items():
        yield key, in_words(shown(value)) if isinstance(value, str) else value


def evaluations(known: Sequence[Result]) -> list[Sequence[str]]:
    """Return the rows of the table of results."""
    names = names_of_sets(result.set for result in known)
    rows = []
    for result in known:
        about = (in_words(result.protocol.protocol), in_words(result.protocol.templates))
        rows.append((_code(names[result.set]), result.key, f"{result.value:.1f}", f"{result.n:,}", *about))
    return rows


def _machine(facts: Mapping[str, Any]) -> dict[str, Any]:
    command = _code(" ".join(map(shown, facts["command"].split(" "))))
    versions = ", ".join(f"{key} {version}" for key, version in facts["versions"].items())
    return {**facts, "command": command, "versions": versions}

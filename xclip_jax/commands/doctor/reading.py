"""Training data and evaluation sets: whether they open, how many samples are bad, and whether reading keeps up."""

import dataclasses
import json
import os
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from xclip_jax.commands.doctor.finding import Finding, attempt, fail, warning
from xclip_jax.core.command_names import command
from xclip_jax.core.errors import UserError
from xclip_jax.data import holdout, images, inspect, labelled, loader, sources
from xclip_jax.data.base import Source
from xclip_jax.data.inspect import LoaderSample
from xclip_jax.evaluators import registry
from xclip_jax.objectives import Objective
from xclip_jax.objectives.clip import Contrastive
from xclip_jax.parallel.mesh import batch_part
from xclip_jax.train.build import Experiment
from xclip_jax.train.encoder import make_encoder, own_profile
from xclip_jax.train.progress import INPUT_BOUND
from xclip_jax.train.training_folder import TrainingFolder

# Share of data.max_bad_fraction above which the samples that were not read may well stop a run.
_MANY_BAD = 0.5
# Share of a batch's pairs whose caption another pair has: they are false negatives of each other.
_MANY_TWINS = 0.05


def check_data(
    experiment: Experiment, folder: TrainingFolder, *, step_seconds: float | None, samples: int, seconds: float
) -> Iterator[Finding]:
    """Yield whether the sources open and can be read, and whether they are read as fast as the steps need them.

    Args:
      experiment: the run's experiment.
      folder: the run's folder.
      step_seconds: time of a step, or None if it was not timed.
      samples: number to read at least.
      seconds: how long to read at least.
    """
    opened, problems = _open(experiment)
    yield from problems
    if opened is None:
        return
    config, objective = experiment.config, experiment.objective
    _, problem = attempt("data", lambda: folder.check_sources(config, [source.fingerprint() for source in opened]))
    controlled, wrong = attempt(
        "data", lambda: holdout.apply_controls(opened, experiment.data, config.seed, labelled=objective.labelled)
    )
    yield from filter(None, (problem, wrong))
    if controlled is None:
        return
    total, unit = sum(map(len, controlled)), "items" if objective.labelled else "pairs"
    epochs = config.steps * experiment.data.batch / total
    text = f"{total:,} {unit} of {len(controlled)} source{'s' if len(controlled) > 1 else ''}; "
    yield Finding("data", f"{text}the run reads {epochs:,.2f} epochs", values={"samples": total, "epochs": epochs})
    transform = loader.Transform(
        experiment.data, experiment.image_size, experiment.tokenizer, experiment.context_length, objective.fields
    )
    sample, problem = attempt(
        "samples",
        lambda: inspect.read_batches(controlled, transform, config.seed, samples=samples, seconds=seconds),
    )
    if sample is None or problem:
        yield from filter(None, [problem])
        return
    yield _bad_samples(sample, opened, experiment.data.max_bad_fraction)
    if sample.text is not None:
        yield _texts(sample.text, experiment)
    if "image" in objective.fields:
        yield from _transparency(opened, experiment.data)
    yield _speed(sample, experiment, step_seconds)


def _open(experiment: Experiment) -> tuple[list[Source] | None, list[Finding]]:
    """Return the sources of a run, or what is wrong with each if they cannot be opened together."""
    data = experiment.data
    opened, problem = attempt("data", lambda: _open_sources(data, experiment.objective))
    if problem is None:
        return opened, []
    if len(data.sources) < 2:
        return None, [problem]
    alone = [
        attempt("data", lambda spec=spec: _open_sources(_one(data, spec), experiment.objective))[1]
        for spec in data.sources
    ]
    return None, [finding for finding in alone if finding] or [problem]


def _one(data: loader.DataConfig, spec: str) -> loader.DataConfig:
    return dataclasses.replace(data, sources=(spec,), weights=(), batch=1)


def _open_sources(data: loader.DataConfig, objective: Objective) -> list[Source]:
    try:
        return sources.open_sources(data, objective.classes, objective.fields)
    except labelled.MismatchError as error:
        raise UserError(f"{error}; {objective.source_remedies.get(error.fault, 'use another source')}.") from error


def _bad_samples(sample: LoaderSample, sources: Sequence[Source], allowed: float) -> Finding:
    bad = sum(sample.bad.values())
    known = sum(sum(source.known_faults().values()) for source in sources) / max(sum(map(len, sources)), 1)
    share = max(bad / (sample.read + bad), known)
    text = f"{share:.2%} bad, of {sample.read + bad:,} that were read"
    values = {"read": sample.read + bad, "bad": bad, "bad_share": share, "allowed_share": allowed}
    if not share:
        return Finding("samples", text, values=values)
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sample.bad.items())
    text += f" ({reasons}; the first is {_place(sample.example)})" if sample.example else " and by the index"
    remedy = f"list them with {command('check')} SOURCE and repair the data, or raise data.max_bad_fraction"
    if share > allowed:
        return fail("samples", f"{text}; above data.max_bad_fraction={allowed:g} the run stops", remedy, **values)
    if share > _MANY_BAD * allowed:
        return warning("samples", f"{text}; the run stops above data.max_bad_fraction={allowed:g}", remedy, **values)
    return Finding("samples", f"{text}; allowed are {allowed:.2%}", values=values)


def _place(line: str) -> str:
    """Return the names of a bad sample, from its line of a ledger."""
    entry = json.loads(line)
    names = {key: value for key, value in entry.items() if key not in ("position", "reason", "detail")}
    return json.dumps(names, ensure_ascii=False)


def _transparency(opened: Sequence[Source], data: loader.DataConfig) -> Iterator[Finding]:
    """Yield how transparent images are read, if there are any."""
    if share := sources.transparent_share(opened, data.read_timeout, data.threads):
        text = f"transparent images: {images.describe(share, data.background)} (data.background={data.background!r})"
        yield Finding("transparency", text, values={"transparent_share": share})


def _texts(text: np.ndarray, experiment: Experiment) -> Finding:
    """Return the lengths of texts, and the share of equal ones, which are false negatives of a contrastive loss."""
    rows = text[: experiment.data.batch]
    twins = inspect.repeated_share(rows)
    cut = float(np.mean(experiment.tokenizer.lengths(text) == text.shape[1]))
    values = {"full_share": cut, "duplicate_share": twins}
    if len(text) > 1 and (text == text[0]).all():
        part = f" in their {experiment.context_length} tokens" if cut else ""
        fault = f"all {len(text):,} texts that were read are equal{part}: there is nothing to learn"
        return fail("texts", fault, "give each image a caption of its own", **values)
    lengths = f"{cut:.0%} of the texts fill all {experiment.context_length} tokens"
    weights = experiment.objective.weights
    contrastive = any(
        isinstance(term, Contrastive) and weights[name] for name, term in experiment.objective.terms.items()
    )
    if contrastive and twins > _MANY_TWINS and not experiment.data.spread_duplicate_captions:
        reason = f"{twins:.0%} of {len(rows)} pairs have the text of another one, which makes them false negatives"
        return warning("texts", f"{lengths}; {reason}", "set data.spread_duplicate_captions=True", **values)
    return Finding("texts", f"{lengths}; {twins:.0%} of {len(rows)} pairs have the text of another one", values=values)


def _speed(sample: LoaderSample, experiment: Experiment, step_seconds: float | None) -> Finding:
    data = experiment.data
    readers = f"data.workers={data.workers}" if data.workers else f"data.threads={data.threads}"
    text = f"{sample.speed:,.0f} samples/s with {readers} on {os.cpu_count()} cores"
    values = {"reading_samples_per_second": sample.speed}
    if data.cache:
        text += ", in the first epoch: data.cache makes later ones faster"
    if not step_seconds:
        return Finding("reading", f"{text}; whether that is enough is unknown without a step", values=values)
    needed = data.batch / batch_part(experiment.mesh)[1] / step_seconds
    share = max(1 - sample.speed / needed, 0.0)
    values |= {"needed_samples_per_second": needed, "wait_share": share}
    text += f"; the steps need {needed:,.0f}"
    if share <= INPUT_BOUND or data.cache:
        return Finding("reading", text, values=values)
    remedy = "raise data.workers (at most the cores) or data.threads, store smaller images, or read from a faster disk"
    return warning("reading", f"{text}: the devices would wait {share:.0%} of the time", remedy, **values)


def check_sets(experiment: Experiment, known: Collection[str] = ()) -> Iterator[Finding]:
    """Yield the evaluation sets that cannot be opened, one finding for each reason that is not in `known`."""
    config = experiment.config.eval
    specs = tuple(dict.fromkeys((*config.sets, *config.final_sets)))
    encoder = make_encoder(experiment, _classes(experiment))
    unopened: dict[str, list[str]] = {}
    for spec in specs:
        _, problem = attempt(
            "evaluation",
            lambda spec=spec: registry.open_all(
                [spec], encoder, profile=own_profile(experiment.config), data=experiment.data
            ),
        )
        if problem:
            unopened.setdefault(problem.text.removeprefix(f"{spec}: "), []).append(spec)
    for reason, names in unopened.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        if reason.rstrip(".") not in {text.rstrip(".") for text in known}:
            yield fail("evaluation", reason if names[0] in reason else f"{names[0]}{more}: {reason}")
    if specs and not unopened:
        interval = "step" if config.every == 1 else f"{config.every:,} steps"
        during = f"{len(config.sets)} of them every {interval}" if config.every else "all at the end"
        opens = "1 set opens" if len(specs) == 1 else f"{len(specs)} sets open"
        yield Finding("evaluation", f"{opens}; {during}", values={"sets": len(specs)})


def _classes(experiment: Experiment) -> Sequence[str] | None:
    """Return the names of the classes of labelled sources; None for pairs, or if the sources cannot be opened."""
    if not experiment.objective.labelled:
        return None
    opened, _ = _open(experiment)
    return opened[0].fingerprint().get("classes") if opened else None

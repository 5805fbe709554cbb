"""Evaluation of a checkpoint on sets, each result added to a file as soon as it is measured."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.core import environment
from xclip_jax.core.console import log0
from xclip_jax.core.errors import public
from xclip_jax.core.run_folder import evaluation_file
from xclip_jax.evaluators import registry, results, tables
from xclip_jax.evaluators.results import Result
from xclip_jax.interop import hub
from xclip_jax.models.two_towers import Variables
from xclip_jax.train.build import Experiment, make_encoder, profile_of_run
from xclip_jax.train.weights import fingerprint, load, pin, read_classes


def evaluate(
    run: str,
    suite: str | Sequence[str],
    *,
    step: int | None = None,
    profile: str = "openai",
    changes: Mapping[str, Any] | None = None,
    data_dir: str = "",
    output: str = "",
) -> dict[str, Any]:
    """Evaluate a checkpoint, add the results to the file set by set, and print their table.

    Args:
      run, step: as in `load`.
      suite: as in `registry.expand_suites`.
      profile: one of `registry.PROFILES`: templates, resizing and retrieval protocol together.
      changes: fields of `Profile` to change; templates and names of own classes are else those of the run's config.
      data_dir: root of the data sets; by default that of the run's config.
      output: file of the results, `evaluation_file(run)` by default; of "hf:ORG/NAME" ORG--NAME.evaluation.json.

    Returns:
      What this call added: its entries are "results".

    Raises:
      UserError: bad input. All sets are opened before the first one is evaluated.
    """
    began = time.perf_counter()
    names, changes = registry.expand_suites(suite), json.loads(json.dumps(changes or {}))  # as the file has them
    dataclasses.replace(registry.profile(profile), **changes)  # for its errors, before the work
    path = epath.Path(output) if output else evaluation_file(hub.local_name(run))
    if output:
        results.make_folder(path)
    pinned, origin = pin(run)
    config, experiment, variables, loaded_step = load(pinned, step)
    if path.exists():
        results.read(path)  # an error for a damaged file, before the work
    encoder = make_encoder(experiment, read_classes(pinned))
    evaluators = registry.open_all(
        names, encoder, data_dir, profile_of_run(config, profile, changes), experiment.config.data
    )
    suites = suite if isinstance(suite, str) else list(suite)
    command = {"suite": suites, "config": schema.to_dict(config), "environment": environment.capture()}
    shared = {"checkpoint": str(run), "step": loaded_step, "profile": profile, "changes": changes}
    model = _facts(config, experiment, variables) | origin
    entries, all_results = [], list[Result]()
    for name, evaluator in zip(names, evaluators, strict=True):
        started = time.perf_counter()
        of_set = registry.measure(evaluator, variables)
        seconds = {"seconds": time.perf_counter() - started}
        entry = results.make_entry(name, evaluator.name, of_set, experiment.preprocessing) | model | shared | seconds
        command["seconds"] = time.perf_counter() - began
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            results.add(path, public(entry), results.items(of_set), command, own=not output)
        entries.append(entry)
        all_results += of_set
    log0(f"{run}, step {loaded_step}, profile {profile}")
    log0(tables.render(all_results))
    log0(f"results: {path}")
    return {**shared, **command, "results": entries}


def _facts(config: Config, experiment: Experiment, variables: Variables) -> dict[str, Any]:
    """Return what an entry says of the model."""
    return {
        "tokenizer": config.data.tokenizer,
        "text_length": experiment.context_length,
        "fingerprint": fingerprint(experiment, variables),
        "eval": results.settings(config),
    }

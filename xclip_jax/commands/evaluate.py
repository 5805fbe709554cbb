"""Evaluate a checkpoint, or compare two evaluations.

    xclip-jax evaluate --checkpoint RUN --suite demo
    xclip-jax evaluate --checkpoint RUN --suite imagenet,imagenet_v2 --profile slip
    xclip-jax evaluate --compare RUN_A RUN_B

RUN is a run's folder, or weights for `xclip_jax.interop`: a folder or file by open_clip, transformers, OpenAI's CLIP or
`xclip-jax export`, or hf:ORG/NAME[@REVISION] of the Hugging Face Hub. Each set's results are added to
RUN/evaluation.json (for a file FILE.evaluation.json, for a repository ORG--NAME.evaluation.json), or to --output, and
replace earlier ones with the same set, step, model and options; `evaluators.results` documents the file.
FILE.items.npz next to it stores per-example values, which --compare resamples for its intervals.

Undecodable images count as wrong, and their number is a result ("unreadable"); more than 5 % of a set are an error.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from xclip_jax.config import schema
from xclip_jax.core import environment
from xclip_jax.core.console import log0
from xclip_jax.core.errors import Parser, UserError, check_choice, check_count, exit_with_message, redact
from xclip_jax.core.imports import add_trust, trusting
from xclip_jax.core.outputs import check_file
from xclip_jax.core.storage import as_path
from xclip_jax.evaluators import registry, results, tables
from xclip_jax.evaluators.prompts import PROFILES, read_class_names
from xclip_jax.evaluators.results import Result
from xclip_jax.evaluators.tables import compare, render_comparison
from xclip_jax.interop import hub
from xclip_jax.parallel import compiler
from xclip_jax.processes import runtime
from xclip_jax.train import checks, weights
from xclip_jax.train.build import make_encoder, profile_of_run

PROFILE_FIELDS = ("prefix", "lower", "captions", "templates", "names")
SAME = "start all processes with the same command, code and packages, and let all read the same weights and sets"


@runtime.ends_all()
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

    If there are several processes (`runtime.join`), all call it, and the first one writes.

    Args:
      run, step: see `weights.load`.
      suite: see `registry.expand_suites`.
      profile: one of `PROFILES`: templates, resizing and retrieval protocol together.
      changes: fields of `Profile` to change; templates and names of your classes default to the run's config.
      data_dir: root of the data sets; by default the run's.
      output: file of the results, `hub.results_file(run)` by default.

    Returns:
      The added entries, as "results", and facts about the command.

    Raises:
      UserError: bad input or differing processes, before the first set is evaluated; or failed sets, after the others.
    """
    began = time.perf_counter()
    names = registry.expand_suites(suite)
    changes = json.loads(json.dumps(changes or {}))  # like in the file
    check_choice("--profile", profile, PROFILES)
    dataclasses.replace(PROFILES[profile], **changes)  # raises errors before the work
    options = {"profile": profile, "changes": changes}
    asked = {"step": step} | options
    checks.check_same_command(asked | {f"set {i}": name for i, name in enumerate(names)}, SAME)
    place = hub.locate(run)
    config, experiment, variables, loaded_step, classes = weights.load(place, step)
    path = as_path(output) if output else hub.results_file(place.name)
    if jax.process_count() == 1:  # with several, only the first writes
        path = check_file("--output", path, rb"^\{")
    results.check(path)  # before the work
    encoder = make_encoder(experiment, classes)
    profile_used = profile_of_run(config, profile, changes)
    opened = registry.open_all(names, encoder, data_dir, profile_used, experiment.config.data)
    registry.check_class_names(changes.get("names", ()), opened)  # the run's may name other classes
    command = {"suite": suite, "config": schema.to_dict(config), "environment": environment.capture()} | options
    shared = {"checkpoint": place.name, "step": loaded_step} | options
    model = {"tokenizer": config.data.tokenizer, "text_length": experiment.context_length} | shared
    model |= {"eval": results.settings(config.eval), "fingerprint": weights.fingerprint(experiment, variables)}
    model |= {"commit": place.commit} if place.commit else {}
    loaded = {key: model[key] for key in ("fingerprint", "step", "eval")}
    checks.check_same_command(loaded | checks.set_hashes(opened), SAME)
    entries = []
    measured: list[Result] = []
    failed: dict[str, str] = {}
    for name, evaluator in zip(names, opened, strict=True):
        started = time.perf_counter()
        try:
            of_set = registry.measure(evaluator, variables)
            entry = results.make_entry(name, evaluator.name, of_set, encoder.preprocessing) | model
        except Exception as error:
            if len(opened) == 1:
                raise
            failed[name] = registry.note_failure(evaluator, error)
            continue
        entry["seconds"] = time.perf_counter() - started
        command["seconds"] = time.perf_counter() - began
        if jax.process_index() == 0:
            results.add(path, redact(entry), results.items(of_set), redact(command), own=not output)
        entries.append(entry)
        measured += of_set
    log0(f"{place.name}, step {loaded_step}, profile {profile}\n{tables.render(measured)}\nresults: {path}")
    if failed:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(names)} evaluation sets failed; {path} has the others.{reasons}")
    return {**shared, **command, "results": entries}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="xclip-jax evaluate", description=__doc__)
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="RUN", help="folder of a run, or weights")
    model.add_argument("--compare", nargs=2, metavar=("A", "B"), help="runs' folders, weights, or results files")
    add(
        "--suite",
        action="append",
        help="demo (the default), paper, or names of sets (docs/evaluate.md), joined by commas",
    )
    add("--profile", help=f"{', '.join(PROFILES)}; openai by default")
    add("--prefix", help="text before captions in retrieval; by default the profile's, for published sets only")
    add("--lower", action="store_true", default=None, help="captions in lower case")
    add("--captions", type=int, help="number of captions per image; 0 for all")
    add("--template", dest="templates", action="append", help="prompt for your labelled images, {c} is the class")
    add("--class-names", dest="names", metavar="FILE", help="JSON file of names for your classes, {label: name}")
    add("--step", type=int, help="step of a run's checkpoint; the newest by default")
    add("--data-dir", default="", help="root of the data sets")
    add("--output", default="", type=os.path.expanduser, help="results file")
    add_trust(parser)
    flags = parser.parse_args(argv)
    given = [getattr(flags, key) for key in ("suite", "profile", *PROFILE_FIELDS, "data_dir", "output")]
    if flags.compare and any(value not in (None, "") for value in given):
        parser.error("--compare reads results and takes only --step; evaluate both with the other options first")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = _arguments(argv)
    with exit_with_message(), trusting(flags.trust):
        if flags.compare:
            log0(render_comparison(compare(*flags.compare, step=flags.step), *flags.compare))
            return
        if flags.captions is not None:
            check_count("--captions", flags.captions, 0)
        compiler.enable_cache()
        flags.names = read_class_names(flags.names) if flags.names else None
        fields = {key: getattr(flags, key) for key in PROFILE_FIELDS}
        evaluate(
            flags.checkpoint,
            [name for text in flags.suite or ["demo"] for name in registry.split_names(text)],
            step=flags.step,
            profile=flags.profile or "openai",
            changes={key: value for key, value in fields.items() if value is not None},
            data_dir=flags.data_dir,
            output=flags.output,
        )


if __name__ == "__main__":
    main()

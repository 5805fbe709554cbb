"""Evaluates a checkpoint, or puts evaluations side by side.

    python -m xclip_jax.evaluate --checkpoint RUN --suite demo
    python -m xclip_jax.evaluate --checkpoint RUN --suite imagenet,imagenet_v2 --profile slip
    python -m xclip_jax.evaluate --compare RUN_A RUN_B

RUN is a run's folder, or weights that `xclip_jax.interop` reads: a folder or file of open_clip, of transformers, of
OpenAI's CLIP or of xclip_jax.export. Results are added to RUN/evaluation.json (RUN.evaluation.json beside a file), or
to --output, set by set: each has its value, metric, protocol, templates, preprocessing, data set version, hash of the
split, n and seconds, and its step and profile. A result of the same set, step and profile is replaced, all others
stay; `evaluators.results` has the layout. Beside the file, in FILE.items.npz, is what each item contributed, which
--compare resamples for its intervals.

Images that cannot be decoded count as wrong, and the result says how many there were ("unreadable"); more than 5 % of a
set are an error.
"""

import argparse
import dataclasses
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from xclip_jax import environment
from xclip_jax.config import schema
from xclip_jax.config.schema import Config
from xclip_jax.console import log0
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import Parser, UserError, exit_with_message
from xclip_jax.evaluators import registry, result, results, summary
from xclip_jax.evaluators.base import Evaluator
from xclip_jax.evaluators.provenance import describe
from xclip_jax.evaluators.result import Result
from xclip_jax.evaluators.statistics import bootstrap
from xclip_jax.storage import write_json
from xclip_jax.train.encoder import make_encoder
from xclip_jax.train.weights import load

NAME = "evaluation.json"


def chosen(suite: str | Sequence[str]) -> tuple[str, ...]:
    """The sets of "demo", "paper", or of names joined by commas, or of several of these.

    A name whose path has commas is not split where the path exists.

    Raises:
      UserError: none, or unknown ones.
    """
    names: dict[str, None] = {}
    for part in [suite] if isinstance(suite, str) else suite:
        names |= dict.fromkeys(registry.SUITES.get(part) or registry.split(part))
    if not names:
        raise UserError(f"--suite is empty; it must be one of {', '.join(registry.SUITES)} or names of sets.")
    for name in names:
        registry.check(name, others=tuple(registry.SUITES))
    return tuple(names)


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
    """Runs the evaluators on a checkpoint, adds each result to the file when it is there, and prints their table.

    Args:
      run, step: as in `load`.
      suite: as in `chosen`.
      profile: one of `registry.PROFILES`: templates, resizing and retrieval protocol together.
      changes: fields of the profile to change: prefix, lower, captions (of retrieval), augment (of SLIP's probe).
      data_dir: root of the data sets; by default that of the run's config.
      output: file of the results, RUN/evaluation.json by default.

    Returns:
      What this call added: its entries are "results".

    Raises:
      UserError: bad input. All sets are opened before the first one is evaluated.
    """
    began = time.perf_counter()
    names, changes = chosen(suite), dict(changes or {})
    protocol = dataclasses.replace(registry.profile(profile), **changes)
    folder = epath.Path(run)
    # Beside a file, under its own name: its folder may hold others.
    path = epath.Path(output or (folder / NAME if folder.is_dir() else folder.with_name(f"{folder.name}.{NAME}")))
    if output:
        _make_folder(path)
    config, parts, variables, at = load(run, step)
    if path.exists():
        results.read(path)  # a damaged file shows now
    encoder = make_encoder(config, parts, run_classes(folder))
    evaluators = registry.open_all(names, encoder, data_dir or parts.data.dir, protocol)
    command = {"suite": suite if isinstance(suite, str) else list(suite), "config": schema.to_dict(config),
               "environment": environment.capture()}  # fmt: skip
    which = {"checkpoint": str(run), "step": at, "profile": profile, "changes": changes}
    measured: list[Result] = []
    added = []
    for name, evaluator in zip(names, evaluators, strict=True):
        since = time.perf_counter()
        of_set = registry.measure(evaluator, variables)
        seconds = time.perf_counter() - since
        added.append(_entry(name, evaluator, of_set, config) | which | {"seconds": seconds})
        measured += of_set
        command["seconds"] = time.perf_counter() - began
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            results.add(path, added[-1], result.items(of_set), command, own=not output)
    log0(f"{run}, step {at}, profile {profile}")
    log0(summary.render(measured))
    log0(f"results: {path}")
    return {**which, **command, "results": added}


def run_classes(folder: epath.Path) -> tuple[str, ...] | None:
    """The classes that a run was fine-tuned on, as its data.json names them; None where it does not.

    Raises:
      UserError: a data.json that cannot be read.
    """
    file = folder / "data.json"
    if not folder.is_dir() or not file.exists():
        return None
    try:
        cards = json.loads(file.read_text())
        classes = next((card["classes"] for card in cards if card.get("classes")), None)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}); restore it: it names the run's classes.") from error
    return None if classes is None else tuple(classes)


def _make_folder(path: epath.Path) -> None:
    """Makes the folder of a file that is written later; raises `UserError` where the file cannot be written."""
    if path.is_dir():
        raise UserError(f"--output {str(path)!r} is a folder; name a file in it.")
    if jax.process_index() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {str(path)!r}: the folder cannot be made ({error}).") from error


def _entry(name: str, evaluator: Evaluator, measured: Sequence[Result], config: Config) -> results.Entry:
    """One set's entry: where it is from, the headline as "value", all metrics by their short names, and the records."""
    headline = next(each for each in measured if each.headline)
    card = dict(describe(headline.protocol))
    if "preprocessing" in card:
        prepare = Preprocessing.from_config(config)
        card["preprocessing"] += f", {prepare.size} px, {prepare.normalization}"
    tokens = {"tokenizer": config.data.tokenizer, "text_length": config.model.tower("txt").context_length}
    sides = {"set": name, "name": evaluator.name, "metric": headline.key, "value": headline.value, "n": headline.n}
    metrics_of = {each.key: each.value for each in measured}
    return card | tokens | sides | {"metrics": metrics_of, "records": result.to_json(measured)}


def _read(where: str, step: int | None, profile: str | None) -> tuple[list[results.Entry], results.ItemsOf]:
    """Entries of one step, the newest by default, and of one checkpoint, the last that was evaluated."""
    path = epath.Path(where)
    path = path / NAME if path.is_dir() else path
    entries, items = results.read(path)
    if not entries:
        raise UserError(f"{path} has no results; evaluate again with --checkpoint.")
    entries = [entry for entry in entries if entry["checkpoint"] == entries[-1]["checkpoint"]]
    steps = sorted({entry["step"] for entry in entries})
    wanted = steps[-1] if step is None else step
    if wanted not in steps:
        raise UserError(f"{path} has no results of step {step}, only of {', '.join(map(str, steps))}.")
    entries = [entry for entry in entries if entry["step"] == wanted and profile in (None, entry["profile"])]
    if not entries:
        raise UserError(f"{path} has no results of step {wanted} and profile {profile!r}.")
    return entries, items


def compare(a: str, b: str, *, step: int | None = None, profile: str | None = None) -> list[dict[str, Any]]:
    """Two evaluations, set by set: {set, metric, a, b, difference, low, high, step_a, step_b, profile}.

    The interval is the 95 % percentile bootstrap of the paired difference; absent for metrics that are no mean over
    items, such as mAP.

    Args:
      a, b: runs' folders, or files that `evaluate` wrote.
      step: of both; by default the newest that each file has.
      profile: of both; by default the one, of those that both files have for a set, that was evaluated last.

    Raises:
      UserError: a file that is missing or damaged, no set in common, or sets that are not the same data.
    """
    (first, items_a), (second, items_b) = _read(a, step, profile), _read(b, step, profile)
    rows = []
    for name in dict.fromkeys(entry["set"] for entry in first):
        sides = [[entry for entry in entries if entry["set"] == name] for entries in (first, second)]
        if not sides[1]:
            continue
        left, right = _pair(*sides)
        # Within one profile images are resized as the profile, or else each model itself, wants it.
        resizing = ("preprocessing",) if left["profile"] != right["profile"] else ()
        for key in ("split_hash", "version", "metric", "templates", "protocol", *resizing):
            if _comparable(left, key) != _comparable(right, key):
                raise UserError(
                    f"{name} is not the same in {a} and {b}: {key} is {left.get(key)!r} and {right.get(key)!r}; "
                    "evaluate both again with the same data and --profile."
                )
        metric = f"{left['name']}/{left['metric']}"
        row = {"set": name, "metric": left["metric"], "a": left["value"], "b": right["value"],
               "step_a": left["step"], "step_b": right["step"], "profile": left["profile"]}  # fmt: skip
        row["difference"] = right["value"] - left["value"]
        of_a, of_b = (items.get(entry["items"], {}) for items, entry in ((items_a, left), (items_b, right)))
        if metric in of_a and metric in of_b:
            _, low, high = bootstrap(of_a[metric], of_b[metric])
            row |= {} if math.isnan(low) else {"low": low, "high": high}
        rows.append(row)
    if not rows:
        raise UserError(f"{a} and {b} have no set in common; evaluate both with the same --suite.")
    return rows


def _pair(lefts: Sequence[results.Entry], rights: Sequence[results.Entry]) -> tuple[results.Entry, results.Entry]:
    """The last two of one profile, or else the last two."""
    pairs = [(left, right) for left in lefts for right in rights
             if (left["profile"], left["changes"]) == (right["profile"], right["changes"])]  # fmt: skip
    return pairs[-1] if pairs else (lefts[-1], rights[-1])


def _comparable(entry: results.Entry, key: str) -> Any:
    """What two entries must have in common at `key`: sizes and statistics of pixels belong to the model."""
    if key == "preprocessing":
        return re.sub(r"(?<=side) to \d+|, \d+ px, .*", "", entry.get(key, ""))
    return entry.get(key)


def render(rows: Sequence[Mapping[str, Any]], a: str, b: str) -> str:
    """The table of `compare`; a star marks differences whose interval leaves out zero."""
    lines = [f"{side.upper()}: {file}, step {rows[0][f'step_{side}']}" for side, file in (("a", a), ("b", b))]
    lines += [f"{'set':<36}{'metric':<24}{'A':>8}{'B':>8}{'B - A':>8}   95 % interval"]
    for row in rows:
        interval = ""
        if "low" in row:
            star = " *" if row["low"] > 0 or row["high"] < 0 else ""
            interval = f"   {row['low']:+.1f} to {row['high']:+.1f}{star}"
        values = "".join(f"{row[key]:>8.1f}" for key in ("a", "b")) + f"{row['difference']:>+8.1f}"
        lines.append(f"{row['set']:<36}{row['metric']:<24}{values}{interval}")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m xclip_jax.evaluate",
        description=__doc__,
        epilog=registry.listing(),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", metavar="RUN", help="folder of a run, or weights")
    parser.add_argument(
        "--suite",
        action="append",
        help="demo (the default), paper, or names of sets joined by "
        "commas; may be given several times. The names are listed below",
    )
    parser.add_argument("--profile", help=f"{', '.join(registry.PROFILES)}; openai by default")
    parser.add_argument("--prefix", help="put before captions of retrieval; by default what the profile says")
    parser.add_argument("--lower", action="store_true", default=None, help="captions in lower case")
    parser.add_argument(
        "--augment",
        action="store_true",
        default=None,
        help="profile slip: probe/ learns from new crops and flips in each of 90 epochs",
    )
    parser.add_argument("--captions", type=int, help="so many captions of each image; 0 for all")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    parser.add_argument("--data-dir", default="", help="root of the data sets")
    parser.add_argument("--output", default="", help="file of the results")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="runs' folders, or files of results; of --step and --profile, or the newest",
    )
    flags = parser.parse_args(argv)
    if bool(flags.checkpoint) == bool(flags.compare):
        parser.error("give either --checkpoint RUN or --compare A B")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    flags = _arguments(argv)
    logging.set_verbosity(logging.ERROR)
    with exit_with_message():
        if flags.compare:
            if flags.output:
                _make_folder(epath.Path(flags.output))
            rows = compare(*flags.compare, step=flags.step, profile=flags.profile)
            log0(render(rows, *flags.compare))
            if flags.output:
                write_json(epath.Path(flags.output), {"a": flags.compare[0], "b": flags.compare[1], "rows": rows})
        else:
            suite = flags.suite or ["demo"]
            changed = {key: getattr(flags, key) for key in ("prefix", "lower", "captions", "augment")}
            evaluate(
                flags.checkpoint,
                suite[0] if len(suite) == 1 else suite,
                step=flags.step,
                profile=flags.profile or "openai",
                changes={key: value for key, value in changed.items() if value is not None},
                data_dir=flags.data_dir,
                output=flags.output,
            )


if __name__ == "__main__":
    main()

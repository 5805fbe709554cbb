"""Evaluates a checkpoint, or puts evaluations side by side.

    python -m xclip_jax.evaluate --checkpoint RUN --suite demo
    python -m xclip_jax.evaluate --checkpoint RUN --suite imagenet,imagenet_v2 --profile slip
    python -m xclip_jax.evaluate --compare RUN_A RUN_B

RUN is a run's folder, or weights that `xclip_jax.interop` reads: a folder or file of open_clip, of transformers, of
OpenAI's CLIP or of xclip_jax.export. The result is RUN/evaluation.json (RUN.evaluation.json beside a file), or
--output: for each set its value, metric, protocol, templates, preprocessing, data set version, hash of the split, n and
seconds; beside it, in evaluation.items.npz, what each item contributed, which --compare resamples for its intervals.
"""

import argparse
import dataclasses
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from xclip_jax import metrics, trainer
from xclip_jax.checkpoint import write_json
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import Parser, UserError, exit_with_message
from xclip_jax.evaluators import Evaluator, sets, table
from xclip_jax.evaluators.card import describe
from xclip_jax.evaluators.scores import Items, bootstrap
from xclip_jax.metrics import say
from xclip_jax.weights import load

NAME = "evaluation.json"
_SIZES = ("n", "images", "queries", "pairs")


def chosen(suite: str) -> tuple[str, ...]:
    """The sets of "demo", "paper", or of names joined by commas; "" and unknown ones raise `UserError`."""
    if suite in sets.SUITES:
        return sets.SUITES[suite]
    names = tuple(dict.fromkeys(filter(None, map(str.strip, suite.split(",")))))
    if not names:
        raise UserError(f"--suite is empty; it must be one of {', '.join(sets.SUITES)} or names of sets.")
    for name in names:
        sets.check(name)
    return names


def evaluate(
    run: str, suite: str, *, step: int | None = None, profile: str = "openai",
    changes: Mapping[str, Any] | None = None, data_dir: str = "", output: str = "",
) -> dict[str, Any]:
    """Runs the evaluators on a checkpoint, writes the results and prints their table.

    Args:
      run, step: as in `load`.
      suite: as in `chosen`.
      profile: one of `sets.PROFILES`: templates, resizing and retrieval protocol together.
      changes: fields of the profile to change: prefix, lower, captions (of retrieval), augment (of SLIP's probe).
      data_dir: root of the data sets; by default that of the run's config.
      output: file of the results, RUN/evaluation.json by default.

    Returns:
      What was written.

    Raises:
      UserError: bad input.
    """
    began = time.perf_counter()
    names = chosen(suite)
    protocol = dataclasses.replace(sets.profile(profile), **(changes or {}))
    config, parts, variables, at = load(run, step)
    encoder = trainer.make_encoder(config, parts)
    flat: dict[str, float] = {}
    items: dict[str, Items] = {}
    results = []
    for name in names:
        since = time.perf_counter()
        evaluator = sets.make(name, encoder, data_dir or parts.data.dir, protocol)
        try:
            found, parts_of = evaluator.measure(variables)
        except Exception as error:
            error.add_note(f"in evaluator {evaluator.name}")
            raise
        results.append(_record(name, evaluator, found, config) | {"seconds": time.perf_counter() - since})
        flat, items = flat | found, items | parts_of
    record = {
        "checkpoint": str(run), "step": at, "suite": suite, "profile": profile, "results": results,
        "config": config.to_dict(), "environment": metrics.environment(), "seconds": time.perf_counter() - began,
    }
    folder = epath.Path(run)
    # Beside a file, under its own name: its folder may hold others.
    path = epath.Path(output or (folder / NAME if folder.is_dir() else folder.with_name(f"{folder.name}.{NAME}")))
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        _write_items(_items_path(path), items)
    say(f"{run}, step {at}, profile {profile}")
    say(table.render(flat))
    say(f"results: {path}")
    return record


def _record(name: str, evaluator: Evaluator, found: Mapping[str, float], config: ml_collections.ConfigDict) -> dict:
    """One set's entry: the card, the card's metric as "value", and all metrics by their short names."""
    card = describe(evaluator.data.card)
    short = {key.removeprefix(f"{evaluator.name}/"): value for key, value in found.items()}
    metric = card.get("metric", "")
    if metric not in short:  # a set whose card says nothing
        metric = next(iter(short))
    if "preprocessing" in card:
        prepare = Preprocessing.from_config(config)
        card["preprocessing"] += f", {prepare.size} px, {prepare.normalization}"
    tokens = {"tokenizer": config.data.tokenizer, "text_length": config.model.txt.length}
    n = next((short[key] for key in short if key.rpartition("/")[2] in _SIZES), 0.0)
    sides = {"set": name, "name": evaluator.name, "metric": metric, "value": short[metric], "n": int(n)}
    return card | tokens | sides | {"metrics": short}


def _items_path(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.stem}.items.npz")


def _write_items(path: epath.Path, items: Mapping[str, Items]) -> None:
    arrays = {}
    for name, item in items.items():
        for part in ("values", "weights", "other"):
            if (array := getattr(item, part)) is not None:
                arrays[f"{item.statistic}:{part}:{name}"] = array
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{key.replace("/", "|"): value for key, value in arrays.items()})
    path.write_bytes(buffer.getvalue())


def _read_items(path: epath.Path) -> dict[str, Items]:
    if not path.exists():
        return {}
    found: dict[str, dict[str, Any]] = {}
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        for key in arrays.files:
            statistic, part, name = key.replace("|", "/").split(":", 2)
            found.setdefault(name, {"statistic": statistic})[part] = arrays[key]
    return {name: Items(**parts) for name, parts in found.items()}


def _read(where: str) -> tuple[dict[str, Any], dict[str, Items]]:
    path = epath.Path(where)
    path = path / NAME if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist; make it with python -m xclip_jax.evaluate --checkpoint RUN.")
    try:
        record = json.loads(path.read_text())
        _ = [(r["set"], r["value"], r["name"]) for r in record["results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of results ({error}); write it anew with --checkpoint.") from error
    return record, _read_items(_items_path(path))


def compare(a: str, b: str) -> list[dict[str, Any]]:
    """Two evaluations, set by set: {set, metric, a, b, difference, low, high}.

    The interval is the 95 % percentile bootstrap of the paired difference; absent for metrics that are no mean over
    items, such as mAP.

    Args:
      a, b: runs' folders, or files that `evaluate` wrote.

    Raises:
      UserError: a file that is missing or damaged, no set in common, or sets that are not the same data.
    """
    (first, items_a), (second, items_b) = _read(a), _read(b)
    others = {result["set"]: result for result in second["results"]}
    found = []
    for left in first["results"]:
        right = others.get(left["set"])
        if right is None:
            continue
        for key in ("split_hash", "version", "metric", "templates", "protocol"):
            if left.get(key) != right.get(key):
                raise UserError(
                    f"{left['set']} is not the same in {a} and {b}: {key} is {left.get(key)!r} and {right.get(key)!r}; "
                    "evaluate both anew with the same data and --profile."
                )
        name = f"{left['name']}/{left['metric']}"
        row = {"set": left["set"], "metric": left["metric"], "a": left["value"], "b": right["value"]}
        row["difference"] = right["value"] - left["value"]
        if name in items_a and name in items_b:
            _, row["low"], row["high"] = bootstrap(items_a[name], items_b[name])
        found.append(row)
    if not found:
        raise UserError(f"{a} and {b} have no set in common; evaluate both with the same --suite.")
    return found


def render(rows: Sequence[Mapping[str, Any]], a: str, b: str) -> str:
    """The table of `compare`; a star marks differences whose interval leaves out zero."""
    lines = [f"A: {a}", f"B: {b}", f"{'set':<36}{'metric':<24}{'A':>8}{'B':>8}{'B - A':>8}   95 % interval"]
    for row in rows:
        interval = ""
        if "low" in row:
            star = " *" if row["low"] > 0 or row["high"] < 0 else ""
            interval = f"   {row['low']:+.1f} to {row['high']:+.1f}{star}"
        values = "".join(f"{row[key]:>8.1f}" for key in ("a", "b")) + f"{row['difference']:>+8.1f}"
        lines.append(f"{row['set']:<36}{row['metric']:<24}{values}{interval}")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m xclip_jax.evaluate", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="RUN", help="folder of a run, or weights")
    parser.add_argument("--suite", default="demo", help="demo, paper, or names of sets joined by commas")
    parser.add_argument("--profile", default="openai", help=", ".join(sets.PROFILES))
    parser.add_argument("--prefix", help="put before captions of retrieval; by default what the profile says")
    parser.add_argument("--lower", action="store_true", default=None, help="captions in lower case")
    parser.add_argument("--augment", action="store_true", default=None,
                        help="profile slip: probe/ learns from new crops and flips in each of 90 epochs")
    parser.add_argument("--captions", type=int, help="so many captions of each image; 0 for all")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    parser.add_argument("--data-dir", default="", help="root of the data sets")
    parser.add_argument("--output", default="", help="file of the results")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="runs' folders, or files of results")
    found = parser.parse_args(argv)
    if bool(found.checkpoint) == bool(found.compare):
        parser.error("give either --checkpoint RUN or --compare A B")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    flags = _arguments(argv)
    logging.set_verbosity(logging.ERROR)
    with exit_with_message():
        if flags.compare:
            rows = compare(*flags.compare)
            say(render(rows, *flags.compare))
            if flags.output:
                write_json(epath.Path(flags.output), {"a": flags.compare[0], "b": flags.compare[1], "rows": rows})
        else:
            changed = {key: getattr(flags, key) for key in ("prefix", "lower", "captions", "augment")}
            evaluate(
                flags.checkpoint, flags.suite, step=flags.step, profile=flags.profile,
                changes={key: value for key, value in changed.items() if value is not None},
                data_dir=flags.data_dir, output=flags.output,
            )


if __name__ == "__main__":
    main()

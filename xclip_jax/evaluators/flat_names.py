"""Results from names and values only, as metrics.jsonl and files of earlier versions have them.

A name is FAMILY/SET/METRIC, and SET may have slashes. It ends where a size of the set follows it in another name:
"zeroshot/emoji/test_concepts/top1" goes with "zeroshot/emoji/test_concepts/ways".
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from xclip_jax.evaluators.provenance import SHIFTED, VALIDATION, Provenance
from xclip_jax.evaluators.result import Result, unit_of

_RECALLS = ("image_to_text/r1", "image_to_text/r5", "text_to_image/r1", "text_to_image/r5")
# Family, a metric that each of its sets has, the metrics to read.
_FAMILIES = (
    ("zeroshot", "top1", ("top1", "top5")),
    ("zeroshot", "map", ("map11", "map")),
    ("retrieval", "captions", _RECALLS),
    ("visual", "majority", ("linear/top1", "knn/top1", "finetuned/top1")),
    ("textual", "majority", ("linear/top1", "finetuned/top1", "finetuned/matthews", "finetuned/f1")),
    ("textual", "queries", ("r1", "r5")),
    ("textual", "pairs", ("spearman_all", "spearman_mean", "finetuned/spearman", "finetuned/pearson")),
)
_SIZES = ("ways", "captions", "queries", "pairs", "n", "images", "texts")
_SCORES = ("cosine", "cross_entropy", "both")
_SHIFTED = ("emoji/test_line", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet")


def read(values: Mapping[str, Any], known: Iterable[Result] = ()) -> list[Result]:
    """Return the results among `values`, {name: value}; other names are ignored.

    Args:
      values: a line of metrics.jsonl, or "results" of results.json.
      known: results of the same sets, such as those of another step; values of their names become results like them.
    """
    by_name = {result.name: result for result in known}
    results = [dataclasses.replace(by_name[name], value=value) for name, value in values.items() if name in by_name]
    rest = {name: value for name, value in values.items() if name not in by_name}
    for name in rest:
        family, _, key = name.partition("/")
        for candidate, common, metrics in _FAMILIES:
            name_of_set = key.removesuffix(f"/{common}")
            # Sizes are under the set's own name, not under those of its groups and scores.
            has_size = any(f"{family}/{name_of_set}/{size}" in rest for size in _SIZES[:4])
            if family == candidate and name_of_set != key and has_size:
                results += _results_of_set(rest, family, name_of_set, metrics)
    return results


def _results_of_set(values: Mapping[str, float], family: str, name: str, metrics: tuple[str, ...]) -> list[Result]:
    """Return the sizes of a set and its `metrics` as results; the first metric is the headline."""
    sizes = {key: values[full] for key in _SIZES if (full := f"{family}/{name}/{key}") in values}
    shifted = family == "zeroshot" and name.startswith(_SHIFTED)
    role = SHIFTED if shifted else VALIDATION if "/validation" in name else ""
    shared: dict[str, Any] = {"set": name, "family": family, "protocol": Provenance(role=role)}
    results = [Result(metric=key, value=value, unit="", **shared) for key, value in sizes.items()]
    headline = True
    for score in ("", *(_SCORES if family == "zeroshot" else ())):
        for metric in metrics:
            full = "/".join(filter(None, (family, name, score, metric)))
            if full not in values:
                continue
            n = next((int(sizes[key]) for key in _counted(metric) if key in sizes), 0)
            chance = _chance(values, sizes, f"{family}/{name}", metric)
            fields: dict[str, Any] = {"unit": unit_of(metric), "n": n, "chance": chance, "score": score}
            results.append(Result(metric=metric, value=values[full], headline=headline, **fields, **shared))
            headline = False
    return results


def _counted(metric: str) -> tuple[str, ...]:
    """Return the sizes that may be the number of items that a metric is measured on."""
    return ("captions",) if metric.startswith("text_to_image") else ("n", "images", "queries", "pairs")


def _chance(values: Mapping[str, float], sizes: Mapping[str, float], prefix: str, metric: str) -> float | None:
    """Return the chance level of a metric in percent, from names or from the sizes; None where unknown."""
    if metric in _RECALLS:
        # Older files have the sizes only: chance of R@1 is 1 / images, if images share no caption.
        by_size = 100 / sizes["images"] if metric.endswith("/r1") and sizes.get("images") else None
        return values.get(f"{prefix}/chance/{metric}", by_size)
    if metric in ("linear/top1", "finetuned/top1"):
        return values.get(f"{prefix}/majority")
    choices = sizes.get("texts", sizes.get("ways"))
    k = {"top1": 1, "r1": 1, "top5": 5, "r5": 5}.get(metric)
    return 100 * min(k / choices, 1) if k and choices else None

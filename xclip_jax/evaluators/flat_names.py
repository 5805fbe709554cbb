"""Reads results of files that have names and values alone, such as metrics.jsonl and those of earlier versions.

A name is FAMILY/SET/METRIC, and SET may have slashes. The sizes of a set, which stand beside its metrics, tell where it
ends: "zeroshot/emoji/test_concepts/top1" is beside "zeroshot/emoji/test_concepts/ways".
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from xclip_jax.evaluators.provenance import SHIFTED, VALIDATION, Provenance
from xclip_jax.evaluators.result import Result

_RECALLS = ("image_to_text/r1", "image_to_text/r5", "text_to_image/r1", "text_to_image/r5")
# Family, the metric that marks a set of it, the metrics to read.
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
    """The results among `values`, {name: value}; names that are none of a result are ignored.

    Args:
      values: a line of metrics.jsonl, or "results" of results.json.
      known: results whose names are looked up first, with other values perhaps.
    """
    by_name = {result.name: result for result in known}
    results = [dataclasses.replace(by_name[name], value=value) for name, value in values.items() if name in by_name]
    rest = {name: value for name, value in values.items() if name not in by_name}
    for name in rest:
        family, _, key = name.partition("/")
        for candidate, mark, metrics in _FAMILIES:
            of = key.removesuffix(f"/{mark}")
            # The sizes of a set stand under its own name alone, not under those of its groups and scores.
            if family == candidate and of != key and any(f"{family}/{of}/{size}" in rest for size in _SIZES[:4]):
                results += _set(rest, family, of, metrics)
    return results


def _set(values: Mapping[str, float], family: str, name: str, metrics: tuple[str, ...]) -> list[Result]:
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
            unit = "x 100" if metric.endswith(("spearman", "pearson", "spearman_all", "spearman_mean")) else "%"
            n = next((int(sizes[key]) for key in _counted(metric) if key in sizes), 0)
            chance = _chance(values, sizes, f"{family}/{name}", metric)
            fields = {"unit": unit, "n": n, "chance": chance, "score": score, "headline": headline}
            results.append(Result(metric=metric, value=values[full], **fields, **shared))
            headline = False
    return results


def _counted(metric: str) -> tuple[str, ...]:
    """The sizes that may say how many items a metric is measured on."""
    return ("captions",) if metric.startswith("text_to_image") else ("n", "images", "queries", "pairs")


def _chance(values: Mapping[str, float], sizes: Mapping[str, float], prefix: str, metric: str) -> float | None:
    if metric in _RECALLS:
        # Files without it have the sizes: 1 / images for R@1, if images share no caption.
        by_size = 100 / sizes["images"] if metric.endswith("/r1") and sizes.get("images") else None
        return values.get(f"{prefix}/chance/{metric}", by_size)
    if metric in ("linear/top1", "finetuned/top1"):
        return values.get(f"{prefix}/majority")
    choices = sizes.get("texts", sizes.get("ways"))
    k = {"top1": 1, "r1": 1, "top5": 5, "r5": 5}.get(metric)
    return 100 * min(k / choices, 1) if k and choices else None

"""Results as people read them: a table, and one line for the middle of a run."""

from collections.abc import Mapping

_METRICS = {
    "zeroshot": ("top1", "top5"),
    "retrieval": ("image_to_text/r1", "image_to_text/r5", "text_to_image/r1", "text_to_image/r5"),
}


def rows(results: Mapping[str, float]) -> list[tuple[str, str, dict[str, float]]]:
    """(family, set, {metric: percent}) of every set in `results`, in their order; groups and kinds are left out."""
    found = []
    for key in results:
        family, _, rest = key.partition("/")
        if family == "zeroshot" and rest.endswith("/ways"):
            name = rest.removesuffix("/ways")
        elif family == "retrieval" and rest.endswith("/captions"):
            name = rest.removesuffix("/captions")
        else:
            continue
        found.append((family, name, {m: results[f"{family}/{name}/{m}"] for m in _METRICS[family]}))
    return found


def headlines(results: Mapping[str, float]) -> str:
    """One line: the first two metrics of each set."""
    parts = []
    for _, name, values in rows(results):
        shown = ", ".join(f"{metric.rpartition('/')[2]} {value:.1f}" for metric, value in list(values.items())[:2])
        parts.append(f"{name} {shown}")
    return "  ".join(parts)


def render(results: Mapping[str, float]) -> str:
    """The final table; what chance gives stands in brackets."""
    lines = []
    classified = [(name, values) for family, name, values in rows(results) if family == "zeroshot"]
    if classified:
        lines.append(f"{'zero-shot classification, %':<42}{'ways':>6}{'images':>8}{'top-1':>8}{'':>7}{'top-5':>8}")
    for name, values in classified:
        ways, n = results[f"zeroshot/{name}/ways"], results[f"zeroshot/{name}/n"]
        chance = [f"({100 * min(k / ways, 1):.1f})" for k in (1, 5)]
        lines.append(
            f"{name:<42}{ways:>6.0f}{n:>8.0f}{values['top1']:>8.1f}{chance[0]:>7}{values['top5']:>8.1f}{chance[1]:>7}"
        )
        for kind in ("cosine", "cross_entropy"):
            if f"zeroshot/{name}/{kind}/top1" in results:
                top1, top5 = (results[f"zeroshot/{name}/{kind}/top{k}"] for k in (1, 5))
                lines.append(f"{'  by clusters, ' + kind.replace('_', '-'):<56}{top1:>8.1f}{'':>7}{top5:>8.1f}")
    retrieved = [(name, values) for family, name, values in rows(results) if family == "retrieval"]
    if retrieved:
        ways = "".join(f"{column:>8}" for column in ("i2t@1", "i2t@5", "t2i@1", "t2i@5"))
        lines.append(f"{'retrieval, recall %':<42}{'images':>6}{'texts':>8}{ways}")
    for name, values in retrieved:
        images, captions = results[f"retrieval/{name}/images"], results[f"retrieval/{name}/captions"]
        lines.append(f"{name:<42}{images:>6.0f}{captions:>8.0f}" + "".join(f"{v:>8.1f}" for v in values.values()))
    return "\n".join(lines)

"""Results as people read them: a table, and one line for the middle of a run."""

from collections.abc import Callable, Mapping

Results = Mapping[str, float]
Row = tuple[str, str, dict[str, float]]

_RECALLS = ("image_to_text/r1", "image_to_text/r5", "text_to_image/r1", "text_to_image/r5")
# Family, the metric that marks a set of it, the metrics to show.
_KINDS = (
    ("zeroshot", "top1", ("top1", "top5")),
    ("zeroshot", "map", ("map11", "map")),
    ("retrieval", "captions", _RECALLS),
    ("visual", "majority", ("linear/top1", "knn/top1", "finetuned/top1")),
    ("textual", "majority", ("linear/top1", "finetuned/top1", "finetuned/matthews", "finetuned/f1")),
    ("textual", "queries", ("r1", "r5")),
    ("textual", "pairs", ("spearman_all", "spearman_mean", "finetuned/spearman", "finetuned/pearson")),
)
# Sets of classes that training may know in a style that it does not, by what their names begin with.
OUT_OF_DOMAIN = ("emoji/test_line", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet")


def rows(results: Results) -> list[Row]:
    """(family, set, {metric: percent}) of every set in `results`, in their order; groups and kinds are left out."""
    found = []
    for key in results:
        family, _, rest = key.partition("/")
        for kind, mark, metrics in _KINDS:
            name = rest.removesuffix(f"/{mark}")
            # The sizes of a set stand under its own name alone, not under those of its groups and kinds.
            sized = any(f"{family}/{name}/{size}" in results for size in ("ways", "captions", "queries", "pairs"))
            if family == kind and name != rest and sized:
                values = {m: results[f"{family}/{name}/{m}"] for m in metrics if f"{family}/{name}/{m}" in results}
                found.append((family, name, values))
    return found


def headlines(results: Results) -> str:
    """One line: the first two metrics of each set."""
    parts = []
    for _, name, values in rows(results):
        shown = ", ".join(f"{metric.rpartition('/')[2]} {value:.1f}" for metric, value in list(values.items())[:2])
        parts.append(f"{name} {shown}")
    return "  ".join(parts)


def render(results: Results) -> str:
    """The final table: the sets of each kind, then one row for each family. What chance gives stands in brackets."""
    parts = (_classified, _retrieved, _probed, _finetuned, _texts, _families)
    return "\n".join(line for part in parts for line in part(results))


def _of(results: Results, *families: str, having: str = "") -> list[Row]:
    return [row for row in rows(results) if row[0] in families and (not having or having in row[2])]


def _classified(results: Results) -> list[str]:
    lines = []
    for _, name, values in _of(results, "zeroshot", having="top1"):
        ways, n = results[f"zeroshot/{name}/ways"], results[f"zeroshot/{name}/n"]
        chance = [f"({100 * min(k / ways, 1):.1f})" for k in (1, 5)]
        lines.append(
            f"{name:<42}{ways:>6.0f}{n:>8.0f}{values['top1']:>8.1f}{chance[0]:>7}{values['top5']:>8.1f}{chance[1]:>7}"
        )
        for kind in ("cosine", "cross_entropy"):
            if f"zeroshot/{name}/{kind}/top1" in results:
                top1, top5 = (results[f"zeroshot/{name}/{kind}/top{k}"] for k in (1, 5))
                lines.append(f"{'  by clusters, ' + kind.replace('_', '-'):<56}{top1:>8.1f}{'':>7}{top5:>8.1f}")
        if name.startswith(OUT_OF_DOMAIN) and "zeroshot/imagenet/top1" in results:
            lines.append(f"{'  less than imagenet':<56}{results['zeroshot/imagenet/top1'] - values['top1']:>8.1f}")
    head = f"{'zero-shot classification, %':<42}{'ways':>6}{'images':>8}{'top-1':>8}{'':>7}{'top-5':>8}"
    several = _of(results, "zeroshot", having="map")
    for _, name, values in several:
        ways, n = results[f"zeroshot/{name}/ways"], results[f"zeroshot/{name}/n"]
        lines.append(f"{name:<42}{ways:>6.0f}{n:>8.0f}{values['map11']:>8.1f} 11-point mAP {values['map']:>8.1f} mAP")
    return [head, *lines] if lines else []


def _retrieved(results: Results) -> list[str]:
    lines = []
    for _, name, values in _of(results, "retrieval"):
        images, captions = results[f"retrieval/{name}/images"], results[f"retrieval/{name}/captions"]
        lines.append(f"{name:<42}{images:>6.0f}{captions:>8.0f}" + "".join(f"{v:>8.1f}" for v in values.values()))
    ways = "".join(f"{column:>8}" for column in ("i2t@1", "i2t@5", "t2i@1", "t2i@5"))
    return [f"{'retrieval, recall %':<42}{'images':>6}{'texts':>8}{ways}", *lines] if lines else []


def _probed(results: Results) -> list[str]:
    lines = []
    for family, name, values in _of(results, "visual", "textual", having="linear/top1"):
        ways, n, most = (results[f"{family}/{name}/{key}"] for key in ("ways", "n", "majority"))
        neighbours = f"{values['knn/top1']:>8.1f}" if "knn/top1" in values else ""
        lines.append(f"{name:<42}{ways:>6.0f}{n:>8.0f}{values['linear/top1']:>8.1f}{f'({most:.1f})':>7}{neighbours}")
    return [f"{'frozen features, %':<42}{'ways':>6}{'items':>8}{'linear':>8}{'':>7}{'kNN':>8}", *lines] if lines else []


def _finetuned(results: Results) -> list[str]:
    lines = []
    for family, name, values in rows(results):
        shown = {key.partition("/")[2]: value for key, value in values.items() if key.startswith("finetuned/")}
        if shown:
            n = next(results[f"{family}/{name}/{key}"] for key in ("n", "pairs") if f"{family}/{name}/{key}" in results)
            lines.append(f"{name:<48}{n:>8.0f}   " + "  ".join(f"{key} {value:.1f}" for key, value in shown.items()))
    return [f"{'fine-tuned, %':<48}{'items':>8}", *lines] if lines else []


def _texts(results: Results) -> list[str]:
    lines = []
    for _, name, values in _of(results, "textual", having="r1"):
        texts, n = results[f"textual/{name}/texts"], results[f"textual/{name}/queries"]
        chance = [f"({100 * min(k / texts, 1):.1f})" for k in (1, 5)]
        lines.append(
            f"{name:<42}{texts:>6.0f}{n:>8.0f}{values['r1']:>8.1f}{chance[0]:>7}{values['r5']:>8.1f}{chance[1]:>7}"
        )
    head = f"{'texts by texts, recall %':<42}{'texts':>6}{'queries':>8}{'R@1':>8}{'':>7}{'R@5':>8}"
    found = [head, *lines] if lines else []
    lines = []
    for _, name, values in _of(results, "textual", having="spearman_all"):
        n = results[f"textual/{name}/pairs"]
        lines.append(f"{name:<48}{n:>8.0f}{values['spearman_all']:>8.1f}{'':>7}{values['spearman_mean']:>8.1f}")
    head = f"{'similarity of texts, Spearman x 100':<48}{'pairs':>8}{'all':>8}{'':>7}{'mean':>8}"
    return [*found, head, *lines] if lines else found


def _families(results: Results) -> list[str]:
    """One row for each family: its first set that is not for validation, the first metric, what chance gives."""
    tested = [row for row in rows(results) if "/validation" not in row[1]] or rows(results)
    outside = [row[0] == "zeroshot" and row[1].startswith(OUT_OF_DOMAIN) for row in tested]
    wanted: tuple[tuple[str, Callable[[Row, bool], bool]], ...] = (
        ("zero-shot classification", lambda row, out: row[0] == "zeroshot" and not out),
        ("out of domain", lambda row, out: out),
        ("retrieval", lambda row, out: row[0] == "retrieval"),
        ("visual representation", lambda row, out: row[0] == "visual"),
        ("textual representation", lambda row, out: row[0] == "textual"),
    )
    lines = []
    for family, fits in wanted:
        row = next((row for row, out in zip(tested, outside, strict=True) if fits(row, out)), None)
        if row:
            metric, value = next(iter(row[2].items()))
            lines.append(f"{family:<26}{row[1]:<30}{metric:<18}{value:>6.1f}{_chance(results, row):>8}")
    return [f"{'the families':<26}{'set':<30}{'metric':<18}{'%':>6}{'chance':>8}", *lines] if len(lines) > 1 else []


def _chance(results: Results, row: Row) -> str:
    family, name, _ = row
    if f"{family}/{name}/majority" in results:
        return f"({results[f'{family}/{name}/majority']:.1f})"
    sizes = [results[f"{family}/{name}/{key}"] for key in ("ways", "texts", "captions") if f"{family}/{name}/{key}" in
             results]
    return f"({100 / sizes[0]:.1f})" if sizes else ""

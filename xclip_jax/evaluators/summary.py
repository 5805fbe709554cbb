"""Results as people read them: tables, and one line for the middle of a run."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

Results = Mapping[str, float]
Row = tuple[str, str, dict[str, float]]

_RECALLS = ("image_to_text/r1", "image_to_text/r5", "text_to_image/r1", "text_to_image/r5")


class Table(NamedTuple):
    """One table: its rows are of one kind of set.

    Attributes:
      title: stands above the sets' names.
      columns: name of each further column, and its format with the least width; one without a name holds what chance
        gives for the one before.
      rows: name of the set and the cells; a name that begins with spaces says more of the set above.
    """

    title: str
    columns: tuple[tuple[str, str], ...]
    rows: list[tuple[str, list[str]]]


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
# Kinds of `zeroshot.similarities` that stand below the set's own.
_SCORES = {"cosine": "clusters, cosine", "cross_entropy": "clusters, cross-entropy", "both": "both heads together"}
# The names of sets of files: what is before an absolute path or URL, as "folder:" and "imagenet@", and the path.
_PATH = re.compile(r"([^:@]*[:@])((?:/|~|\w+://).+)")
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


def short_names(results: Results) -> dict[str, str]:
    """{set: its name in tables}: of an absolute path or URL the last part, or as many as tell the sets apart."""
    names = {name: name for _, name, _ in rows(results)}
    paths = {name: match.groups() for name in names if (match := _PATH.fullmatch(name))}

    def end(prefix: str, path: str, depth: int) -> str:
        return prefix + "/".join(path.rstrip("/").split("/")[-depth:])

    for name, parts in paths.items():
        depth = 1
        while depth <= name.count("/") and [end(*p, depth) for p in paths.values()].count(end(*parts, depth)) > 1:
            depth += 1
        names[name] = end(*parts, depth)
    return names


def headlines(results: Results) -> str:
    """One line: the first two metrics of each set; empty without results."""
    parts, short = [], short_names(results)
    for _, name, values in rows(results):
        shown = ", ".join(f"{metric.rpartition('/')[2]} {value:.1f}" for metric, value in list(values.items())[:2])
        parts.append(f"{short[name]} {shown}")
    return "  ".join(parts)


def tables(results: Results) -> list[Table]:
    """The sets of each kind, then `families` where there are several; what chance gives is in brackets."""
    parts, short = (_classified, _several, _retrieved, _probed, _finetuned, _texts, _similar), short_names(results)
    found = [part(results) for part in parts]
    found = [part._replace(rows=[(short.get(name, name), cells) for name, cells in part.rows]) for part in found]
    return [table for table in (*found, families(results)) if len(table.rows) > (table.title == _FAMILIES)]


def render(results: Results) -> str:
    """The final tables as text, each column as wide as its longest cell; empty without results."""
    shown, lines = tables(results), []
    names = [name for table in shown if table.title != _FAMILIES for name, _ in table.rows]
    width = max([42, *(len(name) + 2 for name in names)])
    for title, columns, rows in shown:
        texts = [(title, [column for column, _ in columns]), *rows]
        forms = []
        for i, (_, form) in enumerate(columns):
            gap = 2 if form[0] == "<" else int(i > 0)  # the first column is right behind the names, which have theirs
            forms.append(f"{form[0]}{max(int(form[1:]), *(len(cells[i]) + gap for _, cells in texts))}")
        for name, cells in texts:
            line = "".join(f"{cell:{form}}" for cell, form in zip(cells, forms, strict=True))
            lines.append(f"{name:<{26 if title == _FAMILIES else width}}{line}".rstrip())
    return "\n".join(lines)


def _of(results: Results, *families: str, having: str = "") -> list[Row]:
    return [row for row in rows(results) if row[0] in families and (not having or having in row[2])]


def _classified(results: Results) -> Table:
    columns = (("ways", ">6"), ("images", ">8"), ("top-1", ">8"), ("", ">7"), ("top-5", ">8"), ("", ">7"))
    found = []
    for _, name, values in _of(results, "zeroshot", having="top1"):
        ways, n = results[f"zeroshot/{name}/ways"], results[f"zeroshot/{name}/n"]
        shares = [f"{values['top1']:.1f}", _by_chance(1, ways), f"{values['top5']:.1f}", _by_chance(5, ways)]
        found.append((name, [f"{ways:.0f}", f"{n:.0f}", *shares]))
        for kind, label in _SCORES.items():
            if f"zeroshot/{name}/{kind}/top1" in results:
                top1, top5 = (results[f"zeroshot/{name}/{kind}/top{k}"] for k in (1, 5))
                found.append((f"  by {label}", ["", "", f"{top1:.1f}", "", f"{top5:.1f}", ""]))
        if name.startswith(OUT_OF_DOMAIN) and "zeroshot/imagenet/top1" in results:
            gap = results["zeroshot/imagenet/top1"] - values["top1"]
            found.append(("  less than imagenet", ["", "", f"{gap:.1f}", "", "", ""]))
    return Table("zero-shot classification, %", columns, found)


def _by_chance(k: int, ways: float) -> str:
    return f"({100 * min(k / ways, 1):.1f})"


def _several(results: Results) -> Table:
    found = []
    for _, name, values in _of(results, "zeroshot", having="map"):
        sizes = [f"{results[f'zeroshot/{name}/{key}']:.0f}" for key in ("ways", "n")]
        found.append((name, [*sizes, f"{values['map11']:.1f}", f"{values['map']:.1f}"]))
    columns = (("ways", ">6"), ("images", ">8"), ("11-point mAP", ">15"), ("mAP", ">8"))
    return Table("zero-shot, several labels an image, %", columns, found)


def _retrieved(results: Results) -> Table:
    found = []
    for _, name, values in _of(results, "retrieval"):
        sizes = [f"{results[f'retrieval/{name}/{key}']:.0f}" for key in ("images", "captions")]
        cells = [cell for m in _RECALLS for cell in (f"{values[m]:.1f}", _by_random_order(results, name, m))]
        found.append((name, [*sizes, *cells]))
    recalls = [column for c in ("i2t@1", "i2t@5", "t2i@1", "t2i@5") for column in ((c, ">8"), ("", ">7"))]
    return Table("retrieval, recall %", (("images", ">6"), ("texts", ">8"), *recalls), found)


def _by_random_order(results: Results, name: str, metric: str) -> str:
    """What a random ranking gives. Results without it have the sizes: 1 / images for R@1, if no caption is shared."""
    value = results.get(f"retrieval/{name}/chance/{metric}")
    if value is None and metric.endswith("/r1"):
        value = 100 / results[f"retrieval/{name}/images"]
    return "" if value is None else f"({value:.1f})"


def _probed(results: Results) -> Table:
    found = []
    for family, name, values in _of(results, "visual", "textual", having="linear/top1"):
        ways, n, most = (results[f"{family}/{name}/{key}"] for key in ("ways", "n", "majority"))
        neighbours = f"{values['knn/top1']:.1f}" if "knn/top1" in values else ""
        found.append((name, [f"{ways:.0f}", f"{n:.0f}", f"{values['linear/top1']:.1f}", f"({most:.1f})", neighbours]))
    columns = (("ways", ">6"), ("items", ">8"), ("linear", ">8"), ("", ">7"), ("kNN", ">8"))
    return Table("frozen features, %", columns, found)


def _finetuned(results: Results) -> Table:
    found = []
    for family, name, values in rows(results):
        shown = {key.partition("/")[2]: value for key, value in values.items() if key.startswith("finetuned/")}
        for i, (key, value) in enumerate(shown.items()):
            n = results.get(f"{family}/{name}/n", results.get(f"{family}/{name}/pairs"))
            found.append(("  the same", ["", key, f"{value:.1f}"]) if i else (name, [f"{n:.0f}", key, f"{value:.1f}"]))
    return Table("fine-tuned, %", (("items", ">14"), ("metric", ">11"), ("%", ">8")), found)


def _texts(results: Results) -> Table:
    found = []
    for _, name, values in _of(results, "textual", having="r1"):
        texts, n = results[f"textual/{name}/texts"], results[f"textual/{name}/queries"]
        shares = [f"{values['r1']:.1f}", _by_chance(1, texts), f"{values['r5']:.1f}", _by_chance(5, texts)]
        found.append((name, [f"{texts:.0f}", f"{n:.0f}", *shares]))
    columns = (("texts", ">6"), ("queries", ">8"), ("R@1", ">8"), ("", ">7"), ("R@5", ">8"), ("", ">7"))
    return Table("texts by texts, recall %", columns, found)


def _similar(results: Results) -> Table:
    found = []
    for _, name, values in _of(results, "textual", having="spearman_all"):
        shares = [f"{values[key]:.1f}" for key in ("spearman_all", "spearman_mean")]
        found.append((name, [f"{results[f'textual/{name}/pairs']:.0f}", *shares]))
    return Table("similarity of texts, Spearman x 100", (("pairs", ">14"), ("all", ">8"), ("mean", ">15")), found)


_FAMILIES = "the families"


def families(results: Results) -> Table:
    """One row for each family: its first set that is not for validation, the first metric, what chance gives."""
    short = short_names(results)
    tested = [row for row in rows(results) if "/validation" not in row[1]] or rows(results)
    outside = [row[0] == "zeroshot" and row[1].startswith(OUT_OF_DOMAIN) for row in tested]
    wanted: tuple[tuple[str, Callable[[Row, bool], bool]], ...] = (
        ("zero-shot classification", lambda row, out: row[0] == "zeroshot" and not out),
        ("out of domain", lambda row, out: out),
        ("retrieval", lambda row, out: row[0] == "retrieval"),
        ("visual representation", lambda row, out: row[0] == "visual"),
        ("textual representation", lambda row, out: row[0] == "textual"),
    )
    found = []
    for family, fits in wanted:
        row = next((row for row, out in zip(tested, outside, strict=True) if fits(row, out)), None)
        if row:
            metric, value = next(iter(row[2].items()))
            found.append((family, [short[row[1]], metric, f"{value:.1f}", _chance(results, row)]))
    return Table(_FAMILIES, (("set", "<30"), ("metric", "<18"), ("%", ">6"), ("chance", ">8")), found)


def _chance(results: Results, row: Row) -> str:
    family, name, values = row
    metric, sizes = next(iter(values)), ("ways", "texts")
    if f"{family}/{name}/majority" in results:
        return f"({results[f'{family}/{name}/majority']:.1f})"
    if family == "retrieval":
        return _by_random_order(results, name, metric)
    size = next((results[f"{family}/{name}/{key}"] for key in sizes if f"{family}/{name}/{key}" in results), None)
    # A mean average precision has no such chance: it depends on how many images have each class.
    return _by_chance(1, size) if size and not metric.startswith("map") else ""

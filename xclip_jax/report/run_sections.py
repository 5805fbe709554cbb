"""The sections of the page that come from the run's files: head, results, curves, health, and what the run was."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from xclip_jax.config.fields import read_group
from xclip_jax.config.renamed import translate
from xclip_jax.errors import UserError
from xclip_jax.evaluators import summary
from xclip_jax.losses import noncontrastive as nclip
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.report.chance import LEVEL, verdict
from xclip_jax.report.charts import Level, Line, chart, number
from xclip_jax.report.markup import Section, esc, missing
from xclip_jax.report.record import Record, Row

NAMES = {"clip": "CLIP", "siglip": "SigLIP", "nclip": "nCLIP", "xclip": "xCLIP"}


def title(record: Record) -> str:
    """What the page is called."""
    name = NAMES.get(_objective(record), _objective(record))
    return f"What {name} learned" if record.complete else f"What {name} has learned so far"


def _objective(record: Record) -> str:
    return record.config["objective"]["name"]


def head(record: Record, parameters: int | None) -> str:
    """The head of the page: what run, what came out, and its facts."""
    config, steps, batch = record.config, record.steps, record.config["data"]["batch"]
    done = f"{steps:,} steps" if steps == config["steps"] else f"{steps:,} of {config['steps']:,} steps"
    return (
        f'<header><div><p class="eyebrow">xclip_jax run report</p><h1>{esc(title(record))}</h1>'
        f'<p class="lead">{done} of {batch:,} image-text pairs, in <code>{esc(record.folder)}</code></p>'
        f"{_tiles(record)}{_facts(record, parameters)}</div></header>"
    )


def _tiles(record: Record) -> str:
    results, at = record.results, ""
    if not results and record.evaluations:
        step, results = record.evaluations[-1]
        at = f"at step {step:,}"
    tiles, short = [], summary.short_names(results)
    for family, row in summary.representatives(results).items():
        metric, result = row.shown[0]
        chance = f"{verdict(result) or 'chance'} ({result.chance:.1f}\u00a0%)" if result.chance is not None else ""
        details = ", ".join(filter(None, (short[row.name], chance, at)))
        unit = " <small>%</small>" if result.unit == "%" else ""
        tiles.append(
            f'<div class="card tile"><span class="name">{esc(family)}</span><b>{result.value:.1f}{unit}</b>'
            f"<span>{esc(metric.label)}</span><span>{_breakable(details)}</span></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _breakable(name: str) -> str:
    """Escaped, and with places where a long name of a set may go on in the next line."""
    return esc(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _facts(record: Record, parameters: int | None) -> str:
    config, environment = record.config, record.environment
    objective, data = config["objective"], config["data"]
    last = record.training[-1] if record.training else {}
    name = NAMES.get(objective["name"], objective["name"])
    if len(objective["terms"]) > 1:
        weighted = (f"{weight:g} {NAMES.get(term, term)}" for term, weight in objective["terms"].items())
        name += f", {' + '.join(weighted)}"
    pairs = sum(source.get("samples", 0) for source in record.sources)
    facts = {
        "Objective": name,
        "Image tower": _image_tower(config),
        "Parameters": f"{parameters:,}" if parameters else "",
        "Training pairs": f"{pairs:,}" if pairs else "",
        "Pairs seen": f"{last['samples']:,} ({last['epoch']:.1f} epochs)" if "epoch" in last else "",
        "Speed": f"{number(last['samples_per_second'])} pairs/s" if last.get("samples_per_second") else "",
        "Bad samples": f"{record.bad:,}" if record.bad else "",
        "Devices": environment.get("devices", ""),
        "Began, UTC": f"{record.began:%Y-%m-%d %H:%M}",
        "Ended, UTC": f"{record.ended:%Y-%m-%d %H:%M}" if record.ended else "not yet",
        "Commit": environment.get("commit", "")[:12] + "-dirty" * environment.get("commit", "").endswith("-dirty"),
        "JAX, Python": f"{environment.get('versions', {}).get('jax', '?')}, {environment.get('python', '?')}",
        "Seed": config["seed"],
        "Data": ", ".join(data["sources"]),
    }
    items = (
        f"<div{_LONG if len(str(value)) > 20 else ''}><dt>{esc(key)}</dt><dd>{esc(value)}</dd></div>"
        for key, value in facts.items()
        if value != ""
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


def _image_tower(config: Mapping[str, Any]) -> str:
    model = translate(config["model"], "model.")
    try:
        return read_group(ModelConfig, model, "model", []).tower("img").describe()
    except UserError:  # of a package that is not installed
        return str(model["plugins"]["img"]["type"])


_LONG = ' class="long"'


def results(record: Record) -> Section:
    """The tables of the last evaluation."""
    found = summary.tables(record.results)
    if not found:
        why = "The last evaluation has not been made yet" if not record.complete else "The run names no evaluation set"
        how = f"python -m xclip_jax.evaluate --checkpoint {record.folder} --suite NAME makes one."
        return missing("results", "Results", f"{why}; {how}")
    say = f"Percent; what chance gives stands in brackets. {_judged(record)}"
    if not record.complete:
        say += " From evaluation.json, since the run is not complete."
    return Section("results", "Results", f"<p>{say}</p>{''.join(map(_table, found))}")


def _judged(record: Record) -> str:
    """Which sets are above chance, in sentences; "" where none can be judged."""
    sets: dict[str, list[str]] = {}
    for row in summary.rows(record.results):
        metric, result = row.shown[0]
        if judged := verdict(result):
            sets.setdefault(judged, []).append(f"{_breakable(row.name)} ({esc(metric.label)})")
    sentences = [f"{judged.capitalize()}: {', '.join(names)}." for judged, names in sorted(sets.items())]
    how = f"By {LEVEL:.0%} binomial intervals, which take items to be independent and of one weight."
    return " ".join([*sentences, how]) if sentences else ""


def _table(found: summary.Table) -> str:
    heads = "".join(f'<th scope="col"{_text(form)}>{esc(name)}</th>' for name, form in found.columns if name)
    rows = []
    for name, cells in found.rows:
        shown: list[str] = []
        for (column, form), cell in zip(found.columns, cells, strict=True):
            if column:
                shown.append(f"<td{_text(form)}>{_breakable(cell)}")
            elif cell:  # a column without a name is set small, behind the cell that it belongs to
                shown[-1] += f" <small>{esc(cell)}</small>"
        more = ' class="more"' if name.startswith(" ") else ""
        rows.append(f'<tr{more}><th scope="row">{_breakable(name.strip())}</th>{"</td>".join(shown)}</td></tr>')
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{esc(found.title)}"><table><thead><tr>'
        f'<th scope="col">{esc(found.title)}</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _text(form: str) -> str:
    return ' class="text"' if form.startswith("<") else ""


def curves(record: Record) -> Section:
    """Everything that was logged, over steps."""
    if not record.training:
        return missing("curves", "Training", "metrics.jsonl holds no step yet; look again later.")
    lines = _Lines(record.training)
    last = record.training[-1]
    clip = "siglip" if "siglip/loss" in last else "clip"
    ln_b = Level("ln b", last["clip/ln_b"]) if "clip/ln_b" in last else None
    entropies = [
        Level(name, last[key]) for name, key in (("ln b", "nclip/ln_b"), ("ln k", "nclip/ln_k")) if key in last
    ]
    timed = _Lines([row for row in record.training if row.get("samples_per_second")])  # the first step compiles
    share = {"scale": 100.0}
    # The total is another curve only where it is of two parts.
    total = {"xclip": (("loss", "minimised"), ("nclip/loss", "nCLIP")), "nclip": (("loss", "nCLIP"),)}.get(
        _objective(record), ()
    )
    drawn = [
        chart("Loss", lines(*total), unit="nats"),
        chart(f"{NAMES[clip]} loss", lines((f"{clip}/loss", "contrastive")), [ln_b] if ln_b else [], unit="nats"),
        chart(
            "Own partner is the best in the batch",
            lines((f"{clip}/acc_img", "image to text"), (f"{clip}/acc_txt", "text to image"), **share),
            unit="%",
        ),
        chart(
            "Cluster entropies",
            lines(
                ("nclip/entropy_img", "one image"),
                ("nclip/entropy_txt", "one text"),
                ("nclip/marginal_entropy_img", "mean of images"),
                ("nclip/marginal_entropy_txt", "mean of texts"),
            ),
            entropies,
            unit="nats",
        ),
        chart("Evaluation on the way", _evaluated(record), unit="%"),
        chart("Learning rate", lines(("lr", "learning rate"))),
        chart("Gradient norm", lines(("grad_norm", "norm"))),
        chart("Logit scale", lines((f"{clip}/scale", "scale"))),
        chart("Parameter norm", lines(("param_norm", "norm"))),
        chart("Speed", timed(("samples_per_second", "pairs a second")), unit="pairs/s"),
        chart("Bad samples", lines(("data/bad_share", "share"), **share), unit="%") if last.get("data/bad") else "",
    ]
    say = (
        "Training metrics of the logged steps. Point at a chart, or focus it and use the arrow keys, to read values. "
        "A guess without looking has a contrastive loss of ln b, b being the batch; k is the number of clusters."
    )
    return Section("curves", "Training", f'<p>{say}</p><div class="grid2">{"".join(drawn)}</div>')


class _Lines:
    """Makes curves of metrics by their keys; those that the run does not have are left out."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, *wanted: tuple[str, str], scale: float = 1.0) -> list[Line]:
        found = []
        for color, (key, name) in enumerate(wanted):
            rows = [row for row in self._rows if isinstance(row.get(key), (int, float))]
            if rows:
                found.append(Line(name, [r["step"] for r in rows], [scale * r[key] for r in rows], color))
        return found


def _evaluated(record: Record) -> list[Line]:
    """The first metric of each set that was evaluated on the way, with its last value where it has one."""
    evaluations = list(record.evaluations)
    if record.complete:
        evaluations.append((record.steps, record.results))
    points: dict[str, list[tuple[float, float]]] = {}
    for step, results_of in evaluations:
        for row in summary.rows(results_of):
            metric, result = row.shown[0]
            label = f"{row.name.rpartition('/')[2] or row.name}, {metric.label}"
            points.setdefault(label, []).append((step, result.value))
    several = {label: at for label, at in points.items() if len(at) > 1 or not record.complete}
    return [Line(label, *zip(*at, strict=True), color % 8) for color, (label, at) in enumerate(several.items())]


def health(record: Record) -> Section:
    """The three failures of cluster heads as lights, with their measures over steps; the rank of features."""
    if not record.training:
        return missing("health", "Health", "No step is logged yet.")
    lines, last = _Lines(record.training), record.training[-1]
    rank = chart(
        "Effective rank of features",
        lines(("rank/img", "images"), ("rank/txt", "texts")),
        note="In how many directions features vary over a batch; 1 would be collapse. No alarm is set on it.",
    )
    if "nclip/agreement" not in last:
        say = (
            "The alarms are of cluster heads, and this objective trains none. Its own sign of failure is a contrastive "
            "loss that stays at ln b, the loss of a blind guess."
        )
        return Section("health", "Health", f'<p>{say}</p><div class="grid2">{rank}</div>')
    k, b = record.config["model"]["cluster_head"]["clusters"], record.config["data"]["batch"]
    ceiling, chance = min(math.log(b), math.log(k)), _chance(last)
    agreed = chance + nclip.AGREEMENT_ABOVE_CHANCE * (1 - chance)
    charts = [
        chart(
            "Mutual information",
            lines(("nclip/mutual_information_img", "images"), ("nclip/mutual_information_txt", "texts")),
            [Level("alarm", nclip.FLAT_SHARE * ceiling, below=True), Level("most", ceiling)],
            unit="nats",
        ),
        chart(
            "Entropy of the mean prediction",
            lines(("nclip/marginal_entropy_img", "images"), ("nclip/marginal_entropy_txt", "texts")),
            [Level("alarm", nclip.FEW_CLUSTERS_SHARE * ceiling, below=True)],
            unit="nats",
        ),
        chart(
            "Agreement of image and text",
            lines(("nclip/agreement", "pairs"), scale=100.0),
            [Level("alarm", 100 * agreed, below=True)],
            unit="%",
        ),
        chart(
            "Clusters in use in a batch",
            lines(("nclip/clusters_img", "images"), ("nclip/clusters_txt", "texts")),
            [Level("most", min(b, k))],
            note=f"Of {k:,} clusters; a batch of {b:,} can use at most {min(b, k):,}.",
        ),
        rank,
    ]
    say = (
        "Cluster heads can collapse in three ways; each has a measure, a threshold and a remedy. Red zones are the "
        "alarms, drawn for the last step."
    )
    body = f'<p>{say}</p>{_lights(record, k, b)}<div class="grid2">{"".join(charts)}</div>'
    return Section("health", "Health", body)


def _chance(row: Row) -> float:
    return 1 / max(row["nclip/clusters_img"], row["nclip/clusters_txt"], 1)


def _alarms(row: Row, k: int, b: int) -> dict[str, str]:
    """{kind: warning} of `diagnose` for one logged step."""
    measures = {key.removeprefix("nclip/"): value for key, value in row.items()}
    return {warning.split(":")[0]: warning for warning in nclip.diagnose(measures, k=k, b=b)}


def _share(part: float, whole: float) -> float:
    """part / whole; 0 where the whole is, as ln 1 of one cluster or of a batch of one pair."""
    return part / whole if whole else 0.0


def _lights(record: Record, k: int, b: int) -> str:
    last, after = record.training[-1], record.config["log"]["collapse_warmup_steps"]
    judged = [row for row in record.training if row["step"] >= after and "nclip/agreement" in row]
    alarms = [(int(row["step"]), _alarms(row, k, b)) for row in judged]
    ceiling, chance = min(math.log(b), math.log(k)), _chance(last)
    information, marginal = (
        min(last[f"nclip/{key}_{m}"] for m in ("img", "txt")) for key in ("mutual_information", "marginal_entropy")
    )
    used = min(last["nclip/clusters_img"], last["nclip/clusters_txt"])
    agreed = chance + nclip.AGREEMENT_ABOVE_CHANCE * (1 - chance)
    flat, few = nclip.FLAT_SHARE * ceiling, nclip.FEW_CLUSTERS_SHARE * ceiling
    most = max(math.log(k), ceiling)
    kinds: dict[str, tuple[str, str, float, float]] = {
        "flat": (
            "Fails when predictions tell pairs nothing apart.",
            f"{information:.2f} nats of mutual information, of {ceiling:.2f} possible; the alarm is below {flat:.2f}.",
            _share(information, ceiling),
            nclip.FLAT_SHARE,
        ),
        "few clusters": (
            "Fails when nearly everything goes to a few clusters.",
            f"{marginal:.2f} nats of entropy of the mean prediction, the alarm is below {few:.2f}; at least {used:.0f} "
            f"of {k:,} clusters in use in a batch.",
            _share(marginal, most),
            _share(few, most),
        ),
        "disagreement": (
            "Fails when image and text commit to different clusters.",
            f"{100 * last['nclip/agreement']:.1f} % of pairs agree; chance is about {100 * chance:.1f} %, and the "
            f"alarm below {100 * agreed:.1f} %.",
            last["nclip/agreement"],
            agreed,
        ),
    }
    cards = []
    for kind, (meaning, measured, value, limit) in kinds.items():
        seen = [step for step, found in alarms if kind in found]
        warning = alarms[-1][1].get(kind, "") if alarms else ""
        state, said = ("alarm", "alarm") if warning else ("", "healthy") if alarms else ("early", "too early")
        history = f"Judged from step {after:,} on: a model's first hundred steps are always flat."
        if not ceiling:
            state, said, warning = "early", "not judged", ""
            history = "One cluster, or a batch of one pair, cannot collapse."
        elif alarms:
            where = f"of {len(alarms):,} logged steps from step {after:,} on"
            history = f"Seen at {len(seen):,} {where}, last at {seen[-1]:,}." if seen else f"Not seen at any {where}."
        told = esc(warning.partition(": ")[2]) if warning else esc(measured)
        cards.append(
            f'<article class="card light {state}"><h3>{kind.capitalize()}<span>{said}</span></h3>'
            f'<div class="gauge" aria-hidden="true"><b style="width:{100 * min(limit, 1):.1f}%"></b>'
            f'<i style="left:{100 * min(max(value, 0), 1):.1f}%"></i></div>'
            f"<p>{meaning if not warning else ''} {told}</p>"
            f"<p><small>{history}</small></p></article>"
        )
    return f'<div class="grid3" style="margin-bottom:16px">{"".join(cards)}</div>'


def about(record: Record) -> Section:
    """Command, versions and config, folded."""
    environment = dict(record.environment)
    command = environment.pop("command", "")
    parts: list[tuple[str, Any]] = [
        ("Versions and machine", environment),
        ("All keys of the config", record.config),
        ("Data that was read", record.sources),
    ]
    folded = "".join(
        f'<details><summary>{name}</summary><pre tabindex="0">{esc(json.dumps(content, indent=2, sort_keys=True))}'
        "</pre></details>"
        for name, content in parts
        if content
    )
    return Section("run", "This run", f"<p>Started by <code>{esc(command)}</code></p>{folded}")

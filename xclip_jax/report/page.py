"""The page of one or more runs: a self-contained HTML file."""

import base64
import functools
import importlib.resources
import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from xclip_jax.config.schema import Config
from xclip_jax.core.console import log0
from xclip_jax.core.errors import redact
from xclip_jax.core.storage import write_whole
from xclip_jax.evaluators import tables
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.evaluators.results import UNITS, Result
from xclip_jax.models.two_towers import Variables
from xclip_jax.report import collect, picture
from xclip_jax.report.charts import decimals, number
from xclip_jax.report.collect import ABOVE, LEVEL, Record, Run, judge, verdicts
from xclip_jax.report.examples import Examples, attention, collect_examples
from xclip_jax.report.sections import sections
from xclip_jax.train import prepare
from xclip_jax.train.build import Experiment
from xclip_jax.train.callbacks import Callback

_TOWERS = {"img": "Image", "txt": "Text"}
THUMB = 72  # side of an image in the page, pixels


def render(runs: Sequence[Run], *, step: int | None = None) -> str:
    """Return the page of one run, or of several runs compared with the first.

    Evaluations of `step` are compared, by default the newest of each run.
    """
    first = runs[0]
    # The sections of a single run without examples contain the reasons themselves.
    with_notes = [run for run in runs if len(runs) > 1 or run.examples.named or run.examples.retrieved]
    notes = [*_notes(runs, with_notes), *(note for run in with_notes for note in run.examples.missing)]
    tested = set(verdicts(first.record.results).values())
    context: dict[str, Any] = {
        "runs": runs,
        "sections": sorted(sections(runs, step), key=lambda section: bool(section.missing)),
        "images": Images(),
        "notes": dict.fromkeys(notes),
        "credits": dict.fromkeys(credit for run in runs for credit in run.examples.credits),
        "level": f"{LEVEL:.0%}",
        "any_steps": any(run.record.steps_of for run in runs),
        "tiles": list(_tiles(first.record)),
        "facts": {key: value for key, value in facts(first.record, first.parameters).items() if value != ""},
        "hopeful": ABOVE in tested or not tested,
    }
    return environment().get_template("page.html").render(context)


def _notes(runs: Sequence[Run], with_predictions: Sequence[Run]) -> Iterator[str]:
    """Yield sentences on held-out pairs that other runs may have seen, and on predictions before the last step."""
    data = [(run.record.config.data.sources, run.record.config.data.holdout) for run in runs]
    names = ", ".join(run.name for run, own in zip(runs, data, strict=True) if own != data[0])
    if names and (runs[0].examples.named or runs[0].examples.retrieved):
        source = runs[0].name
        yield f"Held-out pairs, where shown, come from {source}; {names} learned from data that may contain them."
    for run in with_predictions:
        if run.step is not None and run.step != run.record.steps:
            yield f"Predictions of {run.name} are by the checkpoint of step {run.step:,}."


def _tiles(record: Record) -> Iterator[dict[str, Any]]:
    """Yield the first result of each family."""
    short = tables.short_names(record.results)
    for family, row in tables.first_set_of_each_family(record.results).items():
        metric, result = row.shown[0]
        judged = judge(result)
        step = record.step_of(result)
        first = record.before(result)
        unit = result.unit if result.unit not in UNITS or result.unit == "%" else ""
        chance = f"chance {result.chance:.1f}\u00a0{unit or '%'}" if result.chance is not None else ""
        when = "" if step is None else f"at step {step:,}"
        before = f"before training {decimals(first.value)}" if first else ""
        yield {
            "family": family,
            "value": decimals(result.value),
            "finite": math.isfinite(result.value),
            "unit": unit,
            "label": metric.label + (f", {LEVEL:.0%}: {judged}" if str(judged) else ""),
            "verdict": judged.verdict,
            "details": ", ".join(filter(None, (chance, short[row.name], when, before))),
        }


def facts(record: Record, parameters: int | None = None) -> dict[str, Any]:
    """Return the facts at the head of a run's page; "" if unknown."""
    config = record.config
    objective = record.objective
    last = record.training[-1] if record.training else {}
    samples = sum(source.get("samples", 0) for source in record.sources)
    unit = "items" if objective.labelled else "pairs"
    return {
        "Objective": objective.title + (f", {objective.formula}" if len(objective.terms) > 1 else ""),
        f"{_TOWERS[objective.towers[0]]} tower": config.model.tower(objective.towers[0]).describe(),
        "Parameters": f"{parameters:,}" if parameters else "",
        f"Training {unit}": f"{samples:,}" if samples else "",
        f"{unit.capitalize()} seen": f"{last['samples']:,} ({last['epoch']:.1f} epochs)" if "epoch" in last else "",
        "Speed": f"{number(last['samples_per_second'])} {unit}/s" if last.get("samples_per_second") else "",
        "MFU": f"{last['mfu']:.1%}" if last.get("mfu") else "",
        "Bad samples": f"{last['data/bad']:,.0f}" if last.get("data/bad") else "",
        "Skipped steps": f"{last['skipped_steps']:,.0f}" if last.get("skipped_steps") else "",
        "Devices": record.environment.get("devices", ""),
        "Began, UTC": f"{record.began:%Y-%m-%d %H:%M}",
        "Ended, UTC": f"{record.ended:%Y-%m-%d %H:%M}" if record.ended else "not yet",
        "Seed": config.seed,
        "Data": ", ".join(config.data.sources),
    }


@functools.cache
def environment() -> jinja2.Environment:
    """Return the template environment, which escapes and redacts all values."""
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else redact(str(value)),
    )
    made.filters |= {"breakable": _breakable, "comma": "{:,}".format, "decimals": decimals}
    made.filters |= {"data_uri": data_uri, "done": _done, "file": file, "judge": judge}
    made.filters["at"] = lambda names, indices: " ".join(names[i] for i in indices)
    return made


def _template(name: str) -> str:
    """Return a template without line breaks next to tags, which would become spaces."""
    return re.sub(r"(?<=[>}])\s*\n\s*|\s*\n\s*(?=[<{])", "", file(name))


def file(name: str) -> Markup:
    """Return a style sheet, script or template of this package, unescaped."""
    return Markup(importlib.resources.files("xclip_jax.report").joinpath(name).read_text("utf-8"))


def _breakable(name: str) -> Markup:
    """Return an escaped name that may wrap after / and _."""
    return Markup(str(escape(redact(name))).replace("/", "/<wbr>").replace("_", "_<wbr>"))


def _done(run: Run) -> str:
    steps = run.record.steps
    all_steps = run.record.config.steps
    return f"{steps:,} steps" if steps == all_steps else f"{steps:,} of {all_steps:,} steps"


def data_uri(image: np.ndarray, side: int = 0, *, lossless: bool = False) -> str:
    """Return a uint8 image (h, w, 3) as WebP in a URI, scaled to `side` x `side` pixels if `side` is not 0."""
    square = Image.fromarray(image)
    if side:
        square = square.resize((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    square.save(data, "WEBP", quality=82, lossless=lossless, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


class Images:
    """Images of a page, stored once each as classes in the style sheet."""

    def __init__(self) -> None:
        self._classes: dict[bytes, str] = {}
        self._rules: list[str] = []

    def show(self, image: np.ndarray, alt: str) -> Markup:
        """Return an element for the image with the description `alt`."""
        key = image.tobytes()
        if key not in self._classes:
            self._classes[key] = f"i{len(self._classes)}"
            self._rules.append(f".{self._classes[key]}{{background-image:url({data_uri(image, THUMB)})}}")
        element = Markup('<span class="im {}" role="img" aria-label="{}"></span>')
        return element.format(self._classes[key], redact(alt))

    def css(self) -> Markup:
        """Return the rules of all shown images."""
        return Markup("\n".join(self._rules))


def predict(
    experiment: Experiment,
    encoder: Encoder,
    variables: Variables,
    specs: Sequence[str],
    *,
    config: Config,
    data_dir: str = "",
    seed: int = 0,
) -> Examples:
    """Return a model's examples with attention maps; all processes must call this.

    `config` decides the held-out pairs; see `collect_examples`.
    """
    options = {"data": config.data, "data_dir": data_dir, "seed": seed}
    examples = collect_examples(encoder, variables, specs, **options)
    images = examples.gallery.images
    if images:
        statistics = (experiment.preprocessing.mean, experiment.preprocessing.std)
        examples.maps = attention(experiment.model, variables, images, statistics, experiment.mesh, seed=seed)
    return examples


class ReportWriter(Callback):
    """Writes report.html and picture.png at the end of a run if `eval.report` is set."""

    def on_end(self, run: prepare.Run, variables: Variables, results: Sequence[Result]) -> None:
        """Write the report; a run of one process survives and prints a failure."""
        del results  # read from the folder
        if not run.config.eval.report:
            return
        folder = run.folder
        experiment = run.experiment
        config = experiment.config
        try:
            specs = (*config.eval.sets_at_end, *config.eval.sets)
            examples = predict(experiment, run.encoder, variables, specs, config=config)
            if jax.process_index() != 0:
                return
            record = collect.read(folder.path)
            shown = Run(folder.path.name, 0, record, examples, experiment.num_parameters)
            write_whole(folder.report_file, render([shown]))
            log0(f"report: {folder.report_file}")
            if examples.named or examples.clusters:
                title = f"What {record.objective.title} learned in {config.steps} steps of {config.data.batch} pairs"
                picture.draw(folder.picture_file, examples, title=title)
                log0(f"picture: {folder.picture_file}")
        except Exception as error:
            if jax.process_count() > 1:
                raise  # other processes would wait for this one
            again = f"xclip-jax report {run.config.run} tries again"
            log0(f"no report: {type(error).__name__}: {error}; {again}")

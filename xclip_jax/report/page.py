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

from xclip_jax.core.console import log0
from xclip_jax.core.errors import redact
from xclip_jax.core.storage import write_whole
from xclip_jax.evaluators import tables
from xclip_jax.evaluators.results import UNITS, Result
from xclip_jax.models.two_towers import Variables
from xclip_jax.report import collect, picture
from xclip_jax.report.charts import decimals, number
from xclip_jax.report.collect import LEVEL, Record, Run, judge
from xclip_jax.report.examples import collect_examples
from xclip_jax.report.sections import sections
from xclip_jax.train import prepare
from xclip_jax.train.build import profile_of_run
from xclip_jax.train.callbacks import Callback

_TOWERS = {"img": "Image", "txt": "Text"}
THUMB = 72  # side of an image in the page, pixels
MARK = Markup('<meta name="generator" content="xclip-jax report">')  # in the head of a page


def render(runs: Sequence[Run], *, step: int | None = None) -> str:
    """Return the page of one run, or of several runs compared with the first.

    Evaluations of `step` are compared, by default the newest of each run.
    """
    first = runs[0]
    # The sections of a single run without examples contain the reasons themselves.
    with_notes = [run for run in runs if len(runs) > 1 or run.examples.named or run.examples.retrieved]
    early = [run for run in with_notes if run.step not in (None, run.record.steps)]
    notes = [f"Predictions of {run.name} are by the checkpoint of step {run.step:,}." for run in early]
    notes += [note for run in with_notes for note in run.examples.missing]
    if first.record.results and all(result.family == "retrieval" for result in first.record.results):
        notes.append("Retrieval does not show how well images are named: settings can raise one and lower the other.")
    context: dict[str, Any] = {
        "mark": MARK,
        "runs": runs,
        "sections": sorted(sections(runs, step), key=lambda section: not section.content),
        "images": Images(),
        "notes": dict.fromkeys(notes),
        "credits": dict.fromkeys(credit for run in runs for credit in run.examples.credits),
        "level": f"{LEVEL:.0%}",
        "any_steps": any(run.record.steps_of for run in runs),
        "tiles": list(_tiles(first.record)),
        "facts": {key: value for key, value in facts(first.record, first.parameters).items() if value != ""},
    }
    return environment().get_template("page.html").render(context)


def _tiles(record: Record) -> Iterator[dict[str, Any]]:
    short = tables.shorten(row.name for row in tables.rows(record.results))
    for family, row in tables.first_set_of_each_family(record.results).items():
        metric, result = row.shown[0]
        judged = judge(result)
        step = record.step_of(result)
        unit = result.unit if result.unit not in UNITS or result.unit == "%" else ""
        chance = f"chance {result.chance:.1f}\u00a0{unit}".rstrip() if result.chance is not None else ""
        when = "" if step is None else f"at step {step:,}"
        yield {
            "family": family,
            "value": decimals(result.value),
            "finite": math.isfinite(result.value),
            "unit": unit,
            "label": metric.label + (f", {LEVEL:.0%}: {judged}" if str(judged) else ""),
            "verdict": judged.verdict,
            "details": ", ".join(filter(None, (chance, short[row.name], when))),
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
        # Without line breaks next to tags, which would become spaces.
        loader=jinja2.FunctionLoader(lambda name: re.sub(r"(?<=[>}])\s*\n\s*|\s*\n\s*(?=[<{])", "", file(name))),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else redact(str(value)),
    )
    made.filters |= {"breakable": _breakable, "comma": "{:,}".format, "decimals": decimals}
    made.filters |= {"done": _done, "file": file, "judge": judge}
    return made


def file(name: str) -> Markup:
    """Return a style sheet, script or template of this package, unescaped."""
    return Markup(importlib.resources.files("xclip_jax.report").joinpath(name).read_text("utf-8"))


def _breakable(value: Any) -> Markup:
    """Return an escaped name or value that may wrap after / and _."""
    return Markup(str(escape(redact(str(value)))).replace("/", "/<wbr>").replace("_", "_<wbr>"))


def _done(run: Run) -> str:
    steps = run.record.steps
    all_steps = run.record.config.steps
    return f"{steps:,} steps" if steps == all_steps else f"{steps:,} of {all_steps:,} steps"


def data_uri(image: np.ndarray) -> str:
    """Return a uint8 image (h, w, 3) as WebP in a URI, scaled to `THUMB` x `THUMB` pixels."""
    data = io.BytesIO()
    square = Image.fromarray(image).resize((THUMB, THUMB), Image.Resampling.LANCZOS)
    square.save(data, "WEBP", quality=82, method=4)
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
            self._rules.append(f".{self._classes[key]}{{background-image:url({data_uri(image)})}}")
        element = Markup('<span class="im {}" role="img" aria-label="{}"></span>')
        return element.format(self._classes[key], redact(alt))

    def css(self) -> Markup:
        """Return the rules of all shown images."""
        return Markup("\n".join(self._rules))


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
            profile = profile_of_run(config)
            examples = collect_examples(run.encoder, variables, specs, data=config.data, profile=profile)
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

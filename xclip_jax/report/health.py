"""The section on training health: lights for the failures that the terms of the objective declare, and their charts."""

import dataclasses
from collections.abc import Sequence

from xclip_jax.objectives import Check, Health, Objective
from xclip_jax.report.charts import chart
from xclip_jax.report.markup import Section, esc, missing
from xclip_jax.report.metric_charts import metric_lines, term_chart
from xclip_jax.report.record import Record, Row

_RANK = (("rank/img", "images"), ("rank/txt", "texts"))


def health(record: Record) -> Section:
    """Lights and charts of each term that has some, and the rank of features."""
    if not record.training:
        return missing("health", "Health", "No step is logged yet.")
    text, charts = [], []
    for name, term in record.objective.terms.items():
        rows = complete_rows(record.objective, name, record.training)
        shown = term.report.health(rows[-1]) if rows else Health()
        warnings = Warnings.collect(record, name, rows)
        if shown.checks:
            cards = "".join(_card(check, warnings) for check in shown.checks)
            text.append(f'<p>{esc(shown.summary)}</p><div class="grid3" style="margin-bottom:16px">{cards}</div>')
        charts += [term_chart(curve, record.training, name) for curve in shown.curves]
    rank = chart(
        "Effective rank of features",
        metric_lines(record.training, _RANK),
        note="Number of directions in which features vary over a batch; 1 is collapse. No alarm is set on it.",
    )
    if not text:
        text.append("<p>No alarms are defined for this objective.</p>")
    return Section("health", "Health", f'{"".join(text)}<div class="grid2">{"".join(charts)}{rank}</div>')


def complete_rows(objective: Objective, term: str, rows: Sequence[Row]) -> list[Row]:
    """Metrics of a term, without prefix, and "step", of the rows that have them all."""
    own = [objective.metrics_of(term, row) | {"step": row["step"]} for row in rows]
    names = set().union(*own)
    return [row for row in own if row.keys() == names] if len(names) > 1 else []


@dataclasses.dataclass(frozen=True)
class Warnings:
    """Warnings of one term at the logged steps from `first_step` on: {name: warning} of each step in `steps`."""

    first_step: int
    steps: list[int]
    warnings: list[dict[str, str]]

    @classmethod
    def collect(cls, record: Record, name: str, rows: Sequence[Row]) -> "Warnings":
        """Collect the warnings of the term `name` in `complete_rows`."""
        term, first_step = record.objective.terms[name], record.config.log.collapse_warmup_steps
        judged = [row for row in rows if row["step"] >= first_step]
        by_name = [{text.partition(":")[0]: text for text in term.report.alarms(row)} for row in judged]
        return cls(first_step, [int(row["step"]) for row in judged], by_name)

    @property
    def names(self) -> list[str]:
        """Names of all failures that were warned of."""
        return list(dict.fromkeys(name for warnings in self.warnings for name in warnings))

    def last(self, name: str) -> str:
        """The warning at the last step, or ""."""
        return self.warnings[-1].get(name, "") if self.warnings else ""

    def history(self, name: str) -> str:
        """A sentence on the steps with this warning."""
        if not self.steps:
            return f"Checked from step {self.first_step:,} on (log.collapse_warmup_steps)."
        steps = [step for step, warnings in zip(self.steps, self.warnings, strict=True) if name in warnings]
        where = f"of {len(self.steps):,} logged steps from step {self.first_step:,} on"
        return f"Warning at {len(steps):,} {where}, last at {steps[-1]:,}." if steps else f"No warning at any {where}."


def _card(check: Check, warnings: Warnings) -> str:
    warning, history = warnings.last(check.name), warnings.history(check.name)
    if check.impossible:
        state, label, warning, history = "early", "not judged", "", check.impossible
    elif warning:
        state, label = "alarm", "alarm"
    else:
        state, label = ("", "healthy") if warnings.steps else ("early", "too early")
    text = warning.partition(": ")[2] if warning else f"{check.meaning} {check.measured}"
    gauge = ""
    if check.gauge:
        value, threshold = check.gauge
        gauge = (
            f'<div class="gauge" aria-hidden="true"><b style="width:{100 * threshold:.1f}%"></b>'
            f'<i style="left:{100 * value:.1f}%"></i></div>'
        )
    return (
        f'<article class="card light {state}"><h3>{esc(check.name.capitalize())}<span>{label}</span></h3>{gauge}'
        f"<p>{esc(text)}</p><p><small>{esc(history)}</small></p></article>"
    )

"""Numbers and tables of a study's page as Markdown."""

import math
from collections.abc import Mapping, Sequence

from studies.declaration import Measure, Study
from studies.matrix import Snapshot
from studies.statistics import MIN_SEEDS, Difference, Estimate, estimate


def estimate_text(of_mean: Estimate | None, measure: Measure, *, n: bool = False) -> str:
    """ "12.3 [11.0, 13.6]", with n where it is asked for; of fewer than three runs "12.3 (n = 2)"."""
    if of_mean is None:
        return "-"
    shown, digits = of_mean.mapped(math.exp) if measure.ratio else of_mean, measure.digits
    if shown.n < MIN_SEEDS:
        return f"{shown.mean:.{digits}f} (n = {shown.n})"
    interval = f"[{shown.low:.{digits}f}, {shown.high:.{digits}f}]"
    return f"{shown.mean:.{digits}f} {interval}" + (f", n = {shown.n}" if n else "")


def difference_text(d: Estimate | None, measure: Measure) -> str:
    """ "+1.2 [+0.4, +2.0]"; of a ratio "x 1.10 [1.02, 1.19]"; of fewer than three seeds "+1.2 (n = 2)"."""
    if d is None:
        return "-"
    mean = f"x {math.exp(d.mean):.2f}" if measure.ratio else f"{d.mean:+.{measure.digits}f}"
    return f"{mean} {interval_text(d, measure) or f'(n = {d.n})'}"


def interval_text(d: Estimate | None, measure: Measure) -> str:
    """ "[+0.4, +2.0]" of a difference; "" of fewer than three seeds."""
    if d is None or d.n < MIN_SEEDS:
        return ""
    if measure.ratio:
        return f"[{math.exp(d.low):.2f}, {math.exp(d.high):.2f}]"
    return f"[{d.low:+.{measure.digits}f}, {d.high:+.{measure.digits}f}]"


def signed_text(d: Difference | None, measure: Measure) -> str:
    """ "+1.2 [+0.4, +2.0], 4/5": a difference, and how many of its seeds are above zero."""
    return difference_text(d, measure) + (f", {d.positive}/{d.n}" if d else "")


def p_text(value: float) -> str:
    """A p-value with four digits."""
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, and an empty one."""
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines), ""]


def mean_of(snapshot: Snapshot, arm: str, measure: Measure) -> Estimate | None:
    """The mean of an arm over seeds, of the logarithm where the measure is a ratio; None without runs."""
    values = list(snapshot.values(arm, measure).values())
    if measure.ratio:
        values = [math.log(value) for value in values if value > 0]
    return estimate(values) if values else None


def runs_text(snapshot: Snapshot, arm: str) -> str:
    """ "5", "3 of 5", "5, 1 diverged"."""
    records, planned = snapshot.finished(arm), len(snapshot.study.arm(arm).seeds)
    count = str(planned) if len(records) == planned else f"{len(records)} of {planned}"
    return ", ".join(filter(None, (count, diverged_text(snapshot, arm))))


def diverged_text(snapshot: Snapshot, arm: str) -> str:
    """ "1 diverged", or "" """
    diverged = sum(bool(record.error) for record in snapshot.finished(arm).values())
    return f"{diverged} diverged" if diverged else ""


def rows_of(
    snapshot: Snapshot, arms: Mapping[str, str], measures: Sequence[Measure], *, each: bool = False
) -> list[list[str]]:
    """A row for each {title: arm}: finished runs, and each measure.

    Args:
      snapshot, arms, measures: what is shown.
      each: of two runs, whose interval says little, the two values stand beside the mean.
    """

    def cell(arm: str, measure: Measure) -> str:
        values = snapshot.values(arm, measure).values()
        text = estimate_text(mean_of(snapshot, arm, measure), measure)
        if not each or len(values) != 2:
            return text
        return f"{text.partition(' (')[0]} ({', '.join(f'{value:.{measure.digits}f}' for value in values)})"

    return [
        [title, runs_text(snapshot, arm), *(cell(arm, measure) for measure in measures)] for title, arm in arms.items()
    ]


def shown(study: Study, drawn: Mapping[str, str], name: str, title: str) -> list[str]:
    """Lines of a chart, none where it was not drawn."""
    return [f"![{title}]({study.page}/{name}.svg)", ""] if name in drawn else []


def titles_of(snapshot: Snapshot, section: str) -> dict[str, str]:
    """{title: arm} of a section."""
    return {arm.title: arm.name for arm in snapshot.study.of_section(section)}

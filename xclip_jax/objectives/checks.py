"""Checks of a term's health and charts of its metrics, for warnings and reports."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Level:
    """A horizontal line of a chart.

    Attributes:
      label: text at the line.
      value: a constant, or the name of a metric without the term's prefix, whose last value is drawn.
      alarm: whether values below the line are a failure.
    """

    label: str
    value: float | str
    alarm: bool = False


@dataclasses.dataclass(frozen=True)
class Curve:
    """A chart of a term's metrics over steps.

    Attributes:
      title: title of the chart.
      lines: (metric without the term's prefix, label) of each line.
      unit: unit of the vertical axis; "%" draws shares, and their levels, as percentages.
      levels: horizontal lines to compare with.
      note: a sentence below the chart.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    unit: str = ""
    levels: tuple[Level, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Check:
    """One possible failure of a term, judged by the metrics of one step.

    Attributes:
      name: name of the failure.
      value: the measured value.
      threshold: the check fails if `value` is below it.
      meaning: a sentence on what fails, for reports.
      remedy: the warning: what is wrong, and which config keys to change.
      measured: a sentence with the value and the threshold, for reports.
      maximum: the largest possible value, the full scale of a gauge; 0 for no gauge.
      above: whether the check fails above the threshold instead.
      applies: whether all other conditions of the failure hold.
      impossible: why the failure cannot occur in this run; "" if it can.
    """

    name: str
    value: float
    threshold: float
    meaning: str
    remedy: str
    measured: str = ""
    maximum: float = 0.0
    above: bool = False
    applies: bool = True
    impossible: str = ""

    @property
    def failed(self) -> bool:
        """Whether the failure is present; False for NaN."""
        beyond = self.value > self.threshold if self.above else self.value < self.threshold
        return beyond and self.applies and not self.impossible

    @property
    def warning(self) -> str:
        """The warning of a failed check, "NAME: what is wrong and what to change"."""
        return f"{self.name}: {self.remedy}"

    @property
    def gauge(self) -> tuple[float, float] | None:
        """Value and threshold as shares of `maximum`, from 0 to 1; None without a maximum."""
        if not self.maximum:
            return None
        value, threshold = (min(max(x / self.maximum, 0.0), 1.0) for x in (self.value, self.threshold))
        return value, threshold

    @property
    def level(self) -> Level:
        """The threshold as a line of a chart."""
        return Level("alarm", self.threshold, alarm=not self.above)


@dataclasses.dataclass(frozen=True)
class Health:
    """Whether a term trains well.

    Attributes:
      summary: sentences that introduce the checks.
      checks: the term's possible failures.
      curves: charts of the values that the checks measure.
    """

    summary: str = ""
    checks: tuple[Check, ...] = ()
    curves: tuple[Curve, ...] = ()

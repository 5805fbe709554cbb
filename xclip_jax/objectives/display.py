"""Charts of a term's metrics and indicators of its failures, for reports."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Level:
    """A constant to compare the lines of a chart with.

    Attributes:
      label: beside the line.
      value: the constant, or the name of a metric, without the term's prefix, whose last value it is.
      alarm: whether values below it are a failure.
    """

    label: str
    value: float | str
    alarm: bool = False


@dataclasses.dataclass(frozen=True)
class Curve:
    """A chart of a term's metrics over steps.

    Attributes:
      title: of the chart.
      lines: (metric without the term's prefix, label) of each line.
      unit: of the vertical axis; "%" for shares, which are drawn as percentages, their levels too.
      levels: constants to compare with.
      note: a sentence below the chart.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    unit: str = ""
    levels: tuple[Level, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Light:
    """The state of one possible failure of a term.

    Attributes:
      name: of the failure, with which the warnings of `Term.alarms` begin.
      meaning: a sentence on what fails.
      measured: a sentence with the measured value and its threshold.
      value: the measured value as a share of its maximum, from 0 to 1; None for no gauge.
      threshold: on the scale of `value`; the failure is below it.
      impossible: why the failure cannot occur in this run; "" where it can.
    """

    name: str
    meaning: str
    measured: str = ""
    value: float | None = None
    threshold: float = 0.0
    impossible: str = ""


@dataclasses.dataclass(frozen=True)
class Health:
    """Indicators of whether a term trains well.

    Attributes:
      summary: sentences that introduce them.
      lights: its possible failures.
      curves: charts of what they are measured by.
    """

    summary: str
    lights: tuple[Light, ...] = ()
    curves: tuple[Curve, ...] = ()

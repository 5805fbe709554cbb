"""Checks: failures, gauges and levels."""

import math

import pytest

from xclip_jax.objectives import Check, Level, Term


def check(value, **options):
    return Check("empty", value, 2.0, "Fails when it is empty.", "it is empty. Fill it.", **options)


@pytest.mark.parametrize(
    ("value", "options", "failed"),
    [
        (1.0, {}, True),
        (2.0, {}, False),
        (1.0, {"above": True}, False),
        (3.0, {"above": True}, True),
        (1.0, {"applies": False}, False),
        (1.0, {"impossible": "It has no bottom."}, False),
        (math.nan, {}, False),
    ],
)
def test_a_check_fails_beyond_its_threshold(value, options, failed):
    assert check(value, **options).failed is failed


def test_warning_level_and_gauge_follow_from_the_check():
    low = check(1.0, maximum=4.0)
    assert low.warning == "empty: it is empty. Fill it." and low.level == Level("alarm", 2.0, alarm=True)
    assert low.gauge == (0.25, 0.5) and check(9.0, maximum=4.0).gauge == (1.0, 0.5)
    assert check(1.0).gauge is None and not check(1.0, above=True).level.alarm


def test_a_term_without_a_report_has_a_chart_of_its_loss():
    class Plain(Term):
        title = "plain"

        def __call__(self, out, teacher, state, batch):
            return 0.0, {}, {}

    report = Plain().report
    assert [curve.title for curve in report.curves()] == ["plain loss"] and report.alarms({"loss": 1.0}) == []
    assert (report.progress({"loss": 1.0}), report.progress({})) == ("1.000", "")

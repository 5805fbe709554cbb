"""The training curves and health of one run: lights, their remedies, and charts of terms."""

import dataclasses
import math
import re

import pytest

from examples import superclip as extension  # noqa: F401 the files of a run may name its term
from tests.helpers import tiny
from tests.helpers.pages import Page, check, page_of, written
from tests.objectives.test_term import superclip
from xclip_jax.config import schema
from xclip_jax.objectives.nclip import Nclip
from xclip_jax.report import examples

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def judged_at_once():
    """Warnings from step 1 on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema.Config, "alarm_step", 1)
        yield


def collapsed(kind):
    """Metrics of `nclip` with one of its failures, or none."""
    row = {"nclip/ln_b": math.log(16), "nclip/ln_k": math.log(24), "nclip/agreement": 0.9, "nclip/loss": 0.0}
    for m in ("img", "txt"):
        entropy, marginal = {"flat": (2.7, 2.75), "few clusters": (0.1, 0.5)}.get(kind, (0.1, 2.7))
        row |= {f"nclip/entropy_{m}": entropy, f"nclip/marginal_entropy_{m}": marginal, f"nclip/clusters_{m}": 14.0}
        row[f"nclip/mutual_information_{m}"] = marginal - entropy
    return row | ({"nclip/agreement": 0.05} if kind == "disagreement" else {})


def test_a_term_of_weight_0_has_no_lights_and_no_clusters(tmp_path):
    rows = [{"step": s, "loss": 0.0} | collapsed("flat") for s in (1, 2)]
    config = tiny.config("xclip", objective__terms={"clip": 1.0, "nclip": 0.0})
    text = page_of(written(tmp_path / "run", config, rows), examples.Examples(missing=["nothing"]))
    assert 'class="card light' not in text and 'id="clusters"' not in text


@pytest.mark.parametrize("kind", ["", "few clusters"])
def test_each_failure_has_its_light_and_its_remedy(kind, tmp_path, monkeypatch):
    rows = [{"step": s, "loss": 0.0} | collapsed(kind if s == 2 else "") for s in (1, 2)]
    run = written(tmp_path / "run", tiny.config("nclip"), rows)
    text = page_of(run, examples.Examples())
    lights = re.findall(r'<article class="card light (\w*)"><h3>([^<]+)<span>([^<]+)', text)
    expected = {
        name: ("alarm", "alarm") if name == kind else ("", "healthy")
        for name in ("flat", "few clusters", "disagreement")
    }
    assert {name.lower(): (state, label) for state, name, label in lights} == expected
    measures = {key.removeprefix("nclip/"): value for key, value in rows[-1].items()}
    warnings = Nclip().alarms(measures)
    assert [warning.split(":")[0] for warning in warnings] == ([kind] if kind else [])
    assert all(warning.partition(": ")[2] in " ".join(Page(text).text) for warning in warnings)
    monkeypatch.setattr(schema.Config, "alarm_step", 9)
    early = page_of(run, examples.Examples())
    assert early.count("too early") == 3 and "healthy" not in early.partition("<main")[2].partition("<script")[0]


# --- terms of another package


ROW = {"loss": 8.0, "clip/loss": 2.0, "clip/ln_b": 2.77, "tokens/loss": 6.0, "rank/img": 3.0}
PLUGIN_ROWS = [ROW | {"step": step, "tokens/top1": top1} for step, top1 in ((1, 0.5), (2, 0.0), (3, 0.25))]


def test_a_term_of_another_package_has_curves_and_lights(tmp_path, monkeypatch):
    monkeypatch.setattr(schema.Config, "alarm_step", 2)
    run = written(tmp_path / "run", superclip(), PLUGIN_ROWS)
    text = page_of(run, examples.Examples())
    words = " ".join(check(text).text)
    for sentence in (
        "What superclip has learned so far", "superclip, 1 CLIP + 0.5 tokens",  # head
        "Token loss", "Most probable token in the caption", "CLIP loss",  # curves
        "names tokens at random", "fails when the head learns nothing.",  # health
        "Warning at 1 of 2 logged steps from step 2 on, last at 2.",
    ):  # fmt: skip
        assert sentence in words, sentence
    lights = re.findall(r'light (\w*)"><h3>(\w+)<span>(\w+)', text)
    assert lights == [("", "Plateau", "healthy"), ("", "Tokens", "healthy")]
    alarm = page_of(dataclasses.replace(run, training=run.training[:2]), examples.Examples())
    assert '<article class="card light alarm"><h3>Tokens<span>alarm' in alarm
    assert "the most probable token is hardly ever in the caption. Lower optim.lr." in alarm

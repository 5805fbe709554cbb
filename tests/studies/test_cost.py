import pytest

from studies import cost
from tests.helpers import tiny


def test_ratios_are_of_neighbouring_turns(tmp_path, monkeypatch):
    # The machine slows down: the steps of both become ten times as long in the third turn of four.
    seconds = {"arm": [4, 2, 9, 4, 2, 9, 40, 20, 90, 6, 6, 6], "clip": [2, 2, 2, 2, 2, 2, 20, 20, 20, 2, 2, 2]}
    monkeypatch.setattr(cost, "stepper", lambda name: iter(seconds[name]).__next__)
    measured = cost.compare("arm", "clip", turns=4, steps=3)
    assert (measured["ratio"], measured["low"], measured["high"]) == (2.0, 2.0, 2.25)
    assert measured["seconds"] == {"step": 5.0, "clock": 2.0}
    for ratio in (1.5, 2.0):
        cost.write(tmp_path / "costs.jsonl", "arm", "clip", "c", measured | {"ratio": ratio})
    assert cost.read(tmp_path / "costs.jsonl") == {"arm": 2.0} and cost.read(tmp_path / "none.jsonl") == {}


@pytest.mark.long
@pytest.mark.slow
def test_a_deep_tower_costs_more():
    deep = tiny.config("clip", objective__clip__positives="caption", model__txt__depth=12)
    assert cost.measure(deep, tiny.config("clip"))["ratio"] > 1.5

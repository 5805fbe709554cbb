"""What a run's folder has, read by others."""

import json

import pytest
from etils import epath

from xclip_jax.core import storage


def test_results_are_json_for_every_reader(tmp_path):
    storage.write_json(epath.Path(tmp_path / "x.json"), {"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5]}

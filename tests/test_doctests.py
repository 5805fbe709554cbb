"""Examples in docstrings: every public function of these modules has one that runs."""

import doctest
import importlib

import numpy as np
import pytest
from PIL import Image

import xclip_jax

PUBLIC = {
    "xclip_jax": ("create", "load"),
    "xclip_jax.losses": ("clip", "nclip", "siglip"),
    "xclip_jax.losses.contrastive": ("robust",),
    "xclip_jax.losses.noncontrastive": ("effective_rank",),
    "xclip_jax.evaluators.zeroshot": ("accuracy", "classifier", "mean_per_class"),
    "xclip_jax.evaluators.retrieval": ("recall_at_k",),
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names])
def test_examples(module, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function = getattr(importlib.import_module(module), name)
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, module=False, globs={})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.fixture(scope="module")
def loaded(run):
    return {"model": xclip_jax.load(run), "path": run, "np": np, "xclip_jax": xclip_jax}


METHODS = [name for name, value in vars(xclip_jax.Model).items() if name[0] != "_" and callable(value)]


@pytest.mark.parametrize("name", METHODS)
def test_examples_of_a_model(name, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("fox.png", "hen.png"):
        Image.new("RGB", (20, 16), "orange").save(file)
    (example,) = doctest.DocTestFinder().find(getattr(xclip_jax.Model, name), name, module=False, globs=dict(loaded))
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("name", ["retrieval", "zeroshot"])
def test_public_scores_have_examples(name):
    module = f"xclip_jax.evaluators.{name}"
    assert PUBLIC[module] == importlib.import_module(module).__all__


@pytest.mark.parametrize("name", [name for name in xclip_jax.__all__ if name[0].islower()])
def test_rooms_are_attributes(name):
    """Each name is listed for completion, and what a room lists exists."""
    module = getattr(xclip_jax, name)
    assert name in dir(xclip_jax) == sorted(xclip_jax.__all__)
    for public in getattr(module, "__all__", ()):
        assert getattr(module, public).__doc__, public

"""The icons' recipe: one golden dump for each config, as of the package's own."""

import collections
import dataclasses
import os
import pathlib

import numpy as np
import pytest

from xclip_jax.config import load, schema
from xclip_jax.data import loader, sources, tokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden"
RECIPE = "studies/icons/recipe.py"
CONFIGS = {
    "icons": RECIPE,
    "icons_xclip": f"{RECIPE}:objective=xclip,steps=2000,size=48",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_golden(name):
    config = load.load_config(CONFIGS[name])
    dump = "".join(f"{key} = {value!r}\n" for key, value in sorted(schema.flatten(config.to_dict()).items()))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(dump)
    assert dump == path.read_text()


def test_the_schedule_of_the_icons_is_usual():
    resolved = schema.resolve(load.load_config(RECIPE))
    assert 0 < 3 * resolved.optim.warmup <= 2 * resolved.steps


@pytest.mark.slow
@pytest.mark.parametrize(("spread", "share"), [(True, 0.0016), (False, 0.0721)])
def test_share_of_pairs_whose_caption_another_pair_of_the_batch_has(spread, share):
    """Few, since the recipe keeps records of equal captions apart; `positives` changes little beside it."""
    config = schema.resolve(load.load_config(RECIPE))
    data = dataclasses.replace(config.data, spread_duplicate_captions=spread, cache=False)
    texts = tokenizer.load(data.tokenizer)
    read = loader.Transform(
        data, config.model.img.image_size, texts, config.model.txt.context_length, ("text", "text_key")
    )
    order, equal = loader.sample_order(sources.open_sources(data), data, seed=0), []
    for batch in loader.batches(order, read, batch=data.batch, start=100, stop=140, seed=0):
        keys = collections.Counter(map(tuple, batch["text_key"]))
        equal.append(sum(n for n in keys.values() if n > 1) / data.batch)
    assert np.mean(equal) == pytest.approx(share, abs=1e-4)

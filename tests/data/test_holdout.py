"""Pairs that are held out by their content."""

import shutil

import numpy as np
import pytest

from tests.helpers import tiny
from xclip_jax.core.errors import UserError
from xclip_jax.data import holdout, sources
from xclip_jax.data.config import DataConfig

SHARE = 0.25


def config(*specs, **changes):
    return DataConfig(**{"sources": specs, "batch": 4, "holdout": SHARE} | changes)


def held_out(*specs, **changes):
    """Image hashes of the pairs that are held out of `specs`."""
    c = config(*specs, **changes)
    opened = [sources.open_pairs(spec, sources.source_options(c)) for spec in specs]
    return [x for spec, source in zip(specs, opened, strict=True) for x in holdout.find(spec, source, SHARE, c).hashes]


def trained(*specs, **changes):
    opened = sources.open_sources(config(*specs, **changes))
    return [holdout.image_hash(source[i]["image"]) for source in opened for i in range(len(source))]


def test_the_same_pairs_are_held_out_in_any_order_and_of_any_source(pairs, table_of_pairs, tmp_path):
    expected = held_out(f"folder:{pairs}")
    assert 3 < len(expected) < 20
    keys = {"image_column": "file", "text_columns": ("words",)}
    assert held_out(f"csv:{table_of_pairs}", **keys) == expected[::-1]
    moved = shutil.copytree(pairs, tmp_path / "moved")
    for i, image in enumerate(sorted(moved.glob("*.png"))):  # other names, and so another order
        image.rename(moved / f"{(i * 7) % 40:02d}x.png")
        image.with_suffix(".txt").rename(moved / f"{(i * 7) % 40:02d}x.txt")
    assert sorted(held_out(f"folder:{moved}")) == sorted(expected)
    assert held_out(f"folder:{pairs}", f"csv:{table_of_pairs}", **keys) == expected + expected[::-1]


def test_training_has_the_rest(pairs):
    expected, spec = held_out(f"folder:{pairs}"), f"folder:{pairs}"
    rest = trained(spec)
    assert not set(rest) & set(expected) and len(rest) + len(expected) == 40
    assert trained(spec, cache=True) == rest
    whole = sources.open_sources(config(spec, holdout=0.0))
    (part,) = sources.open_sources(config(spec))
    own = part.fingerprint()
    assert own.pop("data.holdout")["unreadable"] == 0 and own == whole[0].fingerprint() | {"samples": len(part)}


def test_pairs_of_one_image_are_on_one_side(tmp_path):
    folder = tiny.folder(tmp_path / "pairs", 8)
    for i in range(8):
        shutil.copy(folder / f"{i:03d}.png", folder / f"{i + 50:03d}.png")
        (folder / f"{i + 50:03d}.txt").write_text("another caption")
    rest, expected = trained(f"folder:{folder}"), held_out(f"folder:{folder}")
    assert not set(rest) & set(expected) and len(rest) + len(expected) == 16
    assert all(expected.count(x) == 2 for x in expected) and all(rest.count(x) == 2 for x in rest)


def test_the_hash_of_an_image_stays():
    """With another one `retrieval/holdout` would test runs that exist on pairs that they were trained on."""
    assert holdout.image_hash(b"x") == holdout.image_hash(np.full((1, 1, 1), ord("x"), np.uint8)) == "4adf4367f96e584f"
    assert [holdout.is_held_out("4adf4367f96e584f", share) for share in (0.29, 0.30, 1.0)] == [False, True, True]


def test_pairs_that_cannot_be_read_stay_in_training(tmp_path):
    """There they are counted and listed."""
    folder = tiny.folder(tmp_path / "pairs", 20)
    (folder / "003.txt").unlink()
    (folder / "004.txt").write_text("\n")
    spec = f"folder:{folder}"
    (part,) = sources.open_sources(config(spec))
    assert {3, 4} <= set(part.indices.tolist())
    assert holdout.find(spec, part.source, SHARE, config(spec)).bad == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"holdout": 1e-9}, r"data\.holdout=1e-09 and data\.drop='' leave 12 of the 12"),
        ({"holdout": 0.999999}, r"data\.holdout=0.999999 and data\.drop='' leave 0 of the 12"),
        ({"holdout": 0.5, "batch": 12}, r"data\.batch=12 exceeds the \d pairs"),
    ],
)
def test_too_few_and_too_many(changes, named, tmp_path):
    spec = f"folder:{tiny.folder(tmp_path / 'pairs', 12)}"
    with pytest.raises(UserError, match=named):
        sources.open_sources(config(spec, **changes), 0, ("image", "text"))

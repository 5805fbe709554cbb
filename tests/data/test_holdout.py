"""Pairs that are held out by their content."""

import dataclasses
import json
import shutil

import chex
import numpy as np
import pytest

from tests.data.test_loader import Numbers
from tests.helpers import tiny
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import holdout, loader, sources, tokenizer
from xclip_jax.data.config import DataConfig
from xclip_jax.train import trainer

SHARE = 0.25


def config(*specs, **changes):
    return DataConfig(sources=specs, batch=4, **{"holdout": SHARE} | changes)


def held_out(*specs, **changes):
    """Image hashes of the pairs that are held out of `specs`."""
    c = config(*specs, **changes)
    opened = [sources.open_pairs(spec, sources.source_options(c)) for spec in specs]
    return [x for spec, source in zip(specs, opened, strict=True) for x in holdout.find(spec, source, SHARE, c).hashes]


def trained(*specs, **changes):
    """Image hashes of the pairs that a run of `specs` learns from."""
    opened = sources.open_sources(config(*specs, **changes))
    return [holdout.image_hash(source[i]["image"]) for source in opened for i in range(len(source))]


@pytest.fixture(scope="module")
def table(pairs, tmp_path_factory):
    """The pairs of the folder in a table, last one first."""
    path = tmp_path_factory.mktemp("table") / "pairs.csv"
    rows = [f"{image},{image.with_suffix('.txt').read_text().splitlines()[0]}" for image in sorted(pairs.glob("*.png"))]
    path.write_text("\n".join(["file,words", *rows[::-1]]) + "\n")
    return path


def test_the_same_pairs_are_held_out_in_any_order_and_of_any_source(pairs, table, tmp_path):
    expected = held_out(f"folder:{pairs}")
    assert 3 < len(expected) < 20
    keys = {"image_key": "file", "text_keys": ("words",)}
    assert held_out(f"csv:{table}", **keys) == expected[::-1]
    moved = shutil.copytree(pairs, tmp_path / "moved")
    for i, image in enumerate(sorted(moved.glob("*.png"))):  # other names, and so another order
        image.rename(moved / f"{(i * 7) % 40:02d}x.png")
        image.with_suffix(".txt").rename(moved / f"{(i * 7) % 40:02d}x.txt")
    assert sorted(held_out(f"folder:{moved}")) == sorted(expected)
    assert held_out(f"folder:{pairs}", f"csv:{table}", **keys) == expected + expected[::-1]


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


def test_the_share_is_that_of_many_images():
    hashes = [holdout.image_hash(i.to_bytes(4, "big")) for i in range(20_000)]
    few, more = ({x for x in hashes if holdout.is_held_out(x, share)} for share in (0.05, 0.1))
    assert len(few) / 20_000 == pytest.approx(0.05, abs=0.005) and few < more
    assert len(more) / 20_000 == pytest.approx(0.1, abs=0.007)
    assert all(holdout.is_held_out(x, 1.0) for x in hashes)


def test_the_hash_of_an_image_stays():
    """With another one `retrieval/holdout` would test runs that exist on pairs that they were trained on."""
    assert holdout.image_hash(b"x") == holdout.image_hash(np.full((1, 1, 1), ord("x"), np.uint8)) == "4adf4367f96e584f"
    assert [holdout.is_held_out("4adf4367f96e584f", share) for share in (0.29, 0.30)] == [False, True]


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
    ("changes", "message"),
    [
        ({"holdout": 1e-9}, "holds out none of the 12 pairs of data.sources; raise it"),
        ({"holdout": 0.999999}, "holds out all pairs of a source of the 12 pairs"),
        ({"holdout": 0.5, "batch": 12}, r"data\.batch=12 exceeds the \d pairs that data\.holdout leaves"),
    ],
)
def test_too_few_and_too_many(changes, message, tmp_path):
    spec = f"folder:{tiny.folder(tmp_path / 'pairs', 12)}"
    with pytest.raises(UserError, match=message):
        sources.open_sources(dataclasses.replace(config(spec), **changes), 0, ("image", "text"))


def test_labelled_items_have_splits_of_their_own():
    with pytest.raises(UserError, match=r"data\.holdout is for pairs"):
        sources.open_sources(config("folder:/x"), classes=2)


def data_config(**changes):
    return dataclasses.replace(DataConfig(sources=("folder:a",), batch=4), **changes)


def captions(source):
    return [source[i]["text"][0] for i in range(len(source))]


def test_subsets_are_nested_and_follow_the_seed():
    kept = {}
    for seed in (0, 1):
        for share in (0.125, 0.5):
            (source,) = holdout.apply_controls([Numbers("a", 80)], data_config(subset=share), seed)
            kept[seed, share] = captions(source)
            assert len(source) == 80 * share and kept[seed, share] == sorted(
                kept[seed, share], key=lambda x: int(x[2:])
            )
    assert set(kept[0, 0.125]) < set(kept[0, 0.5]) and set(kept[0, 0.5]) != set(kept[1, 0.5])
    opened = [Numbers("a", 80)]
    assert holdout.apply_controls(opened, data_config(), 0) == opened


def test_caption_noise_is_a_derangement_of_its_share():
    clean, noisy = captions(Numbers("a", 80)), {}
    for share in (0.25, 0.5, 1.0):
        (source,) = holdout.apply_controls([Numbers("a", 80)], data_config(caption_noise=share), 0)
        noisy[share] = {i for i, caption in enumerate(captions(source)) if caption != clean[i]}
        assert len(noisy[share]) == 80 * share
        assert sorted(captions(source)) == sorted(clean)
        assert all((source[i]["image"] == Numbers("a", 80)[i]["image"]).all() for i in range(80))
    assert noisy[0.25] < noisy[0.5]


def test_a_donor_gives_its_keywords_too():
    class Tagged(Numbers):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"tags": [f"tag {i}"]}

    (source,) = holdout.apply_controls([Tagged("a", 10)], data_config(caption_noise=1.0), 0)
    assert all(source[i]["text"][0][2:] == source[i]["tags"][0][4:] != str(i) for i in range(10))


def test_a_bad_donor_is_named():
    class Damaged(Numbers):
        def __getitem__(self, i):
            if i == 3:
                raise BadSample("caption is empty")
            return super().__getitem__(i)

        def describe(self, i):
            return {"file": f"{i}.png"}

    (source,) = holdout.apply_controls([Damaged("a", 10)], data_config(caption_noise=1.0), 0)
    (recipient,) = np.flatnonzero(source.donors == 3)
    with pytest.raises(BadSample, match=r"the pair whose captions it has is bad") as caught:
        source[int(recipient)]
    assert caught.value.detail == "3.png: caption is empty"


def test_noise_stays_within_the_subset():
    (source,) = holdout.apply_controls([Numbers("a", 80)], data_config(subset=0.5, caption_noise=0.5), 0)
    (subset,) = holdout.apply_controls([Numbers("a", 80)], data_config(subset=0.5), 0)
    assert sorted(captions(source)) == sorted(captions(subset))


@pytest.mark.parametrize(
    ("changes", "labelled", "message"),
    [
        ({"subset": 0.03}, False, "data.subset=0.03 leaves 2 pairs, fewer than data.batch=4"),
        ({"caption_noise": 0.01}, False, "data.caption_noise=0.01 is less than two of the 80 pairs of 'folder:a'"),
        ({"caption_noise": 0.5}, True, "data.caption_noise exchanges captions, and labelled items have none"),
    ],
)
def test_impossible_controls_are_one_sentence(changes, labelled, message):
    with pytest.raises(UserError, match=message):
        holdout.apply_controls([Numbers("a", 80)], data_config(**changes), 0, labelled=labelled)


def test_batches_of_a_noisy_subset_are_the_same_from_any_start():
    config = data_config(subset=0.5, caption_noise=0.5, threads=1)
    transform = loader.Transform(config, 8, tokenizer.load("bytes"), 16)

    def read(start):
        order = loader.sample_order(holdout.apply_controls([Numbers("a", 80)], config, 3), config, 3)
        return list(loader.batches(order, transform, batch=4, start=start, stop=6, seed=3))

    for straight, resumed in zip(read(0)[3:], read(3), strict=True):
        chex.assert_trees_all_equal(straight, resumed)


def test_a_run_trains_on_the_subset(pairs, tmp_path):
    changes = {"data__sources": (f"folder:{pairs}",), "data__subset": 0.5}
    trainer.run(tiny.config("clip", run=tmp_path / "run", steps=2, **changes))
    last = tiny.lines(tmp_path / "run")[-1]
    assert last["epoch"] == pytest.approx(2 * tiny.BATCH / 20)
    assert json.loads((tmp_path / "run" / "data.json").read_text())[0]["samples"] == 40

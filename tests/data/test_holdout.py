"""Pairs that are held out by their content, and retrieval on pairs of one's own."""

import dataclasses
import json
import re
import shutil

import chex
import numpy as np
import pytest

from tests.data.test_loader import Numbers
from tests.helpers import tiny
from tests.helpers.encoding import SIZE, make_encoder, small_model
from xclip_jax.commands import evaluate
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import holdout, loader, sources, tokenizer, transforms
from xclip_jax.data.config import DataConfig
from xclip_jax.evaluators import registry, retrieval
from xclip_jax.evaluators.prompts import PROFILES, with_own
from xclip_jax.evaluators.sets import pair_sets
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
    with pytest.raises(UserError, match=r"data\.holdout holds out pairs"):
        sources.open_sources(config("folder:/x"), classes=2)


# --- retrieval


def test_retrieval_on_own_pairs(pairs, table):
    encoder, variables = make_encoder(), small_model()[1]
    plain = registry.open_all([f"retrieval/folder:{pairs}"], encoder)[0]
    assert len(plain.data.images) == 40 and plain.data.captions[3] == ["picture 3", "number 3"]
    assert plain.data.images[3].shape == (SIZE, SIZE, 3)
    metrics = plain.run(variables)
    name = f"retrieval/folder:{pairs}"
    assert metrics[f"{name}/captions"] == 54 and 0 <= metrics[f"{name}/image_to_text/r1"] <= 100
    data = DataConfig(image_key="file", text_keys=("words",))
    (of_table,) = registry.open_all([f"retrieval/csv:{table}"], encoder, data=data)
    assert [x[0] for x in of_table.data.captions] == [x[0] for x in plain.data.captions][::-1]
    np.testing.assert_array_equal(of_table.data.images[0], plain.data.images[39])


def test_a_set_of_pairs_names_its_columns(table, run):
    data = DataConfig(image_key="file", text_keys=("words",))
    of_keys = registry.load(f"retrieval/csv:{table}", SIZE, data=data)
    spec = f"retrieval/csv:{table}?image=file&text=words"
    evaluate.main(["--checkpoint", str(run), "--suite", spec, "--output", str(table.parent / "results.json")])
    (entry,) = json.loads((table.parent / "results.json").read_text())["results"]
    assert entry["split_hash"] == of_keys.card.split_hash and entry["data"] == of_keys.card.data == f"csv:{table}"
    both = registry.load(f"retrieval/csv:{table}?image=file&text=words&text=fi%6Ce", SIZE)
    assert len(both.captions[0]) == 2 and both.captions[0][0] == of_keys.captions[0][0]
    pattern = registry.load(f"retrieval/csv:{str(table)[:-5]}?.csv?image=file", SIZE, data=data)
    assert pattern.captions == of_keys.captions
    remedy = r"no column 'image'; its columns are 'file', 'words'; name its .*/SOURCE\?image=COLUMN&text=COLUMN\.$"
    with pytest.raises(SystemExit, match=remedy):
        evaluate.main(["--checkpoint", str(run), "--suite", f"retrieval/csv:{table}"])
    for end in ("?image=file&text=", "?image=file&image=words", "?image=file&label=words", "?text"):
        with pytest.raises(UserError, match=r"ends in .*; expected \?image=COLUMN&text=COLUMN, or one of the two"):
            registry.load(f"retrieval/csv:{table}{end}", SIZE)


def test_rows_of_one_image_are_one_item_with_all_their_captions(tmp_path):
    """As Flickr8k's: a row a caption. A perfect ranking finds all, with as many captions as there are rows."""
    folder, again = tiny.folder(tmp_path / "pairs", 6), tmp_path / "again.csv"
    images = sorted(folder.glob("*.png"))
    rows = [f"{image},{words} of {i % 6}" for words in ("side", "top") for i, image in enumerate(images)]
    again.write_text("\n".join(["image,text", *rows, rows[0]]) + "\n")
    data = registry.load(f"retrieval/csv:{again}", SIZE)
    assert data.captions == [[f"side of {i}", f"top of {i}"] for i in range(6)] and len(data.images) == 6
    first = transforms.evaluation_image(images[1].read_bytes(), SIZE)
    np.testing.assert_array_equal(data.images[1], first)
    match = retrieval.positives(data.captions)
    assert match.shape == (6, 12) and (match.sum(axis=0) == 1).all() and (match.sum(axis=1) == 2).all()
    copied = shutil.copytree(folder, tmp_path / "copied")  # the same images in another source of the same run
    parts = [
        holdout.find(s, sources.open_pairs(s), 1.0, DataConfig()) for s in (f"folder:{folder}", f"folder:{copied}")
    ]
    assert [x.tolist() for x in pair_sets.firsts(parts)] == [[0, 1, 2, 3, 4, 5], []]
    assert list(pair_sets.captions_by_image(parts).values()) == parts[0].captions


def test_captions_of_own_pairs_follow_the_profile_but_for_its_prefix(pairs):
    spec = f"retrieval/folder:{pairs}"
    plain = registry.load(spec, SIZE)
    assert plain.captions[3] == ["picture 3", "number 3"] and plain.card.templates == "CAPTION"
    for prefix in ("a drawing, ", PROFILES["openai"].published_prefix):  # what a command asks for, the default too
        changed = dataclasses.replace(PROFILES["openai"], captions=1, prefix=prefix)
        data = registry.load(spec, SIZE, profile=changed)
        assert data.captions[3] == [f"{prefix}picture 3"] and data.card.templates == f"{prefix}CAPTION"
        assert plain.card.split_hash != data.card.split_hash


def test_pairs_that_cannot_be_read_are_left_out_of_retrieval(tmp_path, capsys):
    folder = tiny.folder(tmp_path / "pairs", 20)
    (folder / "003.txt").unlink()
    assert len(registry.load(f"retrieval/folder:{folder}", SIZE).images) == 19
    assert "1 of the 20 pairs cannot be read and are left out" in capsys.readouterr().out


def test_held_out_pairs_of_the_run_and_of_another_one(pairs, run, tmp_path):
    spec = f"folder:{pairs}"
    own = registry.load("retrieval/holdout", SIZE, data=config(spec))
    assert own.name == "holdout" and len(own.images) == len(held_out(spec))
    assert own.card.data == spec and own.card.split == "held out, 0.25"
    other = tmp_path / "run"
    shutil.copytree(run, other)
    with pytest.raises(UserError, match=r"this model holds out no pairs .* write retrieval/holdout@RUN"):
        registry.load("retrieval/holdout", SIZE)
    with pytest.raises(UserError, match=r"the run .* holds out no pairs"):
        registry.load(f"retrieval/holdout@{other}", SIZE)
    with pytest.raises(UserError, match="'/nowhere' is not the folder of a run"):
        registry.load("retrieval/holdout@/nowhere", SIZE)
    content = json.loads((other / "config.json").read_text())
    content["config"]["data"] |= {"sources": [spec], "holdout": SHARE}
    (other / "config.json").write_text(json.dumps(content))
    same = registry.load(f"retrieval/holdout@{other}", SIZE)
    assert same.captions == own.captions and same.card.split_hash == own.card.split_hash


@pytest.mark.parametrize("family", ["retrieval", "zeroshot"])
def test_the_commands_data_dir_goes_before_that_of_another_run(family, run, tmp_path, monkeypatch):
    other = shutil.copytree(run, tmp_path / "run")
    content = json.loads((other / "config.json").read_text())
    content["config"]["data"] |= {"sources": ["tfds:x/train"], "holdout": SHARE, "dir": "/of/run"}
    (other / "config.json").write_text(json.dumps(content))
    opened = []
    for name in ("open_pairs", "open_labelled"):
        monkeypatch.setattr(sources, name, lambda spec, options: opened.append(options.dir) or sources.parse("?:"))
    own = config("tfds:x/train", dir="/of/model")
    for at, data_dir, expected in (
        (f"@{other}", None, "/of/run"), (f"@{other}", "/mine", "/mine"), ("", "", "/of/model"), ("", "/mine", "/mine"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="unknown source"):
            registry.load(f"{family}/holdout{at}", SIZE, data_dir, data=own)
        assert opened.pop() == expected


def test_columns_of_images_are_not_confused(pairs, tmp_path):
    """Two sets of one table."""
    images = sorted(pairs.glob("*.png"))[:4]
    lines = [f"{a},{b},{a.stem}" for a, b in zip(images[:2], images[2:], strict=True)]
    (tmp_path / "x.csv").write_text("\n".join(["left,right,text", *lines]) + "\n")
    loaded = [registry.load(f"retrieval/csv:{tmp_path / 'x.csv'}?image={side}", SIZE) for side in ("left", "right")]
    assert loaded[0].captions == loaded[1].captions and loaded[0].card.split_hash != loaded[1].card.split_hash


def test_names_of_sets_of_pairs(pairs):
    assert registry.expand_suites(f"retrieval/folder:{pairs},retrieval/holdout")
    for wrong in ("retrieval/", "retrieval/holdou"):
        with pytest.raises(UserError, match=r"unknown evaluation set.*did you mean 'retrieval/holdout'"):
            registry.check(wrong)
    with pytest.raises(UserError, match=r"retrieval/flatt: no file or folder 'flatt'; check the path"):
        registry.check("retrieval/flatt")
    right = "retrieval/x.csv?image=path&text=caption"
    with pytest.raises(
        UserError, match=rf"'image=path' is not a set; .* question mark: write {re.escape(repr(right))}"
    ):
        registry.expand_suites("retrieval/x.csv,image=path,text=caption")
    assert registry.expand_suites(right) == (right,)


def test_a_path_of_own_pairs_needs_no_kind_before_it(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my, pairs").symlink_to(pairs)
    (tmp_path / "a.csv").write_text(f"path,caption\n{pairs / '000.png'},a picture\n")
    for path, spec in (
        ("my, pairs", "folder:my, pairs"),
        (str(pairs), f"folder:{pairs}"),
        ("a.csv?image=path&text=caption", "csv:a.csv?image=path&text=caption"),
    ):
        (name,) = registry.expand_suites(f"retrieval/{path}")
        loaded = registry.load(name, SIZE)
        assert loaded.name == spec
        assert loaded.card.split_hash == registry.load(f"retrieval/{spec}", SIZE).card.split_hash
    with pytest.raises(UserError, match="no file or folder '/no/pairs'"):
        registry.check("retrieval//no/pairs")
    (tmp_path / "notes.xyz").write_text("no pairs")
    with pytest.raises(UserError, match=r"'notes\.xyz' is a file of no known kind"):
        registry.check("retrieval/notes.xyz")


def test_a_run_is_evaluated_on_what_it_holds_out(pairs, tmp_path):
    changes = {"data__holdout": SHARE, "eval__every": 2, "eval__sets": ("retrieval/holdout",), "data__batch": 8}
    c = tiny.short(pairs, tmp_path / "run", **changes)
    results = trainer.run(c)
    assert results["retrieval/holdout/images"] == len(held_out(f"folder:{pairs}"))
    assert 0 <= results["retrieval/holdout/text_to_image/r1"] <= 100
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved["results"]["retrieval/holdout/image_to_text/r1"] == results["retrieval/holdout/image_to_text/r1"]
    c.data.holdout = 0.5
    with pytest.raises(UserError, match=r"different config: data\.holdout"):
        trainer.run(c)


# --- labelled images of one's own


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Pairs in sub-folders that are classes."""
    folder = tmp_path_factory.mktemp("classes")
    for number, name in enumerate(("red_fox", "hen")):
        tiny.folder(folder / name, 20, seed=number)
    return folder


def test_held_out_images_are_named(classes):
    data = config(f"folder:{classes}")
    named = registry.load("zeroshot/holdout", SIZE, data=data)
    pairs = registry.load("retrieval/holdout", SIZE, data=data)
    assert named.name == "holdout" and named.names == ["hen", "red_fox"]
    assert named.prompts == [["a photo of a hen"], ["a photo of a red fox"]]
    # FolderSource and a folder of classes have the same order.
    assert len(named.images) == len(pairs.images) == len(named.labels)
    np.testing.assert_array_equal(named.images[0], pairs.images[0])
    assert set(named.labels) == {0, 1} and named.card.split == "held out, 0.25"
    assert 0 <= registry.evaluator(make_encoder(), named).run(small_model()[1])["zeroshot/holdout/top1"] <= 100


def test_own_templates_and_names(classes, tmp_path):
    path = tmp_path / "names.json"
    path.write_text('{"red_fox": ["fox", "vixen"]}')
    profile = with_own(PROFILES["openai"], ["art of a {c}", "{c}!"], str(path))
    data = registry.load(f"folder:{classes}", SIZE, profile=profile)
    assert data.prompts == [["art of a hen", "hen!"], ["art of a fox", "fox!", "art of a vixen", "vixen!"]]
    assert data.card.templates == "art of a {c} | {c}!"
    for content, message in (
        (
            '{"owl": "owl", "elk": "elk"}',
            "none of the class names, such as 'elk', is among its 2 classes, such as 'hen'",
        ),
        ('{"hen": 3}', "are not {label: name}"),
        ("{", "cannot be read"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            registry.load(f"folder:{classes}", SIZE, profile=with_own(PROFILES["openai"], [], str(path)))
    with pytest.raises(UserError, match=r"template 'a fox' has no \{c\}"):
        with_own(PROFILES["openai"], ["a fox"], "")


def test_a_file_of_class_names_serves_several_sets(classes, tmp_path, capsys):
    """One with the classes of two sets, as a run's eval.class_names has to have."""
    (tmp_path / "other").mkdir()
    tiny.folder(tmp_path / "other" / "owl", 4)
    names = tmp_path / "names.json"
    names.write_text('{"red_fox": "vixen", "owl": "night bird", "elk": "elk"}')
    profile = with_own(PROFILES["openai"], ["{c}"], str(names))
    first, other = (registry.load(f"folder:{x}", SIZE, profile=profile) for x in (classes, tmp_path / "other"))
    assert first.prompts == [["hen"], ["vixen"]] and other.prompts == [["night bird"]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("2 of 3 class names, such as 'elk', are not of its 2 classes, such as 'hen'")
    assert len(lines) == 2


def test_templates_of_a_run_and_of_the_command(classes, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    content = json.loads((copy / "config.json").read_text())
    content["config"]["eval"]["templates"] = ["one {c}"]
    (copy / "config.json").write_text(json.dumps(content))
    command = ["--checkpoint", str(copy), "--suite", f"folder:{classes}"]
    evaluate.main(command)
    evaluate.main([*command, "--template", "two {c}", "--template", "{c}"])
    entries = json.loads((copy / "evaluation.json").read_text())
    templates = [entry["templates"] for group in ("results", "other_results") for entry in entries[group]]
    assert sorted(templates) == ["one {c}", "two {c} | {c}"]
    with pytest.raises(SystemExit, match=r"template 'a fox' has no \{c\}"):
        evaluate.main([*command, "--template", "a fox"])


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
    assert caught.value.detail == "file 3.png: caption is empty"


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

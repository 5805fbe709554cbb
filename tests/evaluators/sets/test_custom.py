"""Retrieval on your own pairs and on held-out pairs."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from tests.data.test_holdout import SHARE, config, held_out
from tests.helpers import tiny
from tests.helpers.encoding import SIZE, make_encoder, small_model
from xclip_jax.commands import evaluate
from xclip_jax.core.errors import UserError
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators import registry, retrieval
from xclip_jax.evaluators.prompts import PROFILES, read_class_names
from xclip_jax.evaluators.sets import custom


def test_retrieval_on_own_pairs(pairs, table_of_pairs):
    name = f"retrieval/folder:{pairs}"
    plain = registry.open_all([name], make_encoder())[0]
    assert len(plain.data.images) == 40 and plain.data.captions[3] == ["picture 3", "number 3"]
    assert plain.data.images[3].shape == (SIZE, SIZE, 3)
    metrics = plain.run(small_model()[1])
    assert metrics[f"{name}/captions"] == 54 and 0 <= metrics[f"{name}/image_to_text/r1"] <= 100
    of_table = registry.load(f"retrieval/csv:{table_of_pairs}?image=file&text=words", SIZE)
    assert [x[0] for x in of_table.captions] == [x[0] for x in plain.data.captions][::-1]
    np.testing.assert_array_equal(of_table.images[0], plain.data.images[39])


def test_a_set_of_pairs_names_its_columns(table_of_pairs):
    spec = f"retrieval/csv:{table_of_pairs}?image=file&text=words"
    of_keys = registry.load(spec, SIZE)
    assert registry.expand_suites(spec) == (spec,) and of_keys.card.data == f"csv:{table_of_pairs}"
    both = registry.load(f"{spec}&text=fi%6Ce", SIZE)
    assert len(both.captions[0]) == 2 and both.captions[0][0] == of_keys.captions[0][0]
    pattern = registry.load(f"retrieval/csv:{str(table_of_pairs)[:-5]}?.csv?image=file&text=words", SIZE)
    assert pattern.captions == of_keys.captions
    with pytest.raises(UserError, match=r"no column 'image'.*SOURCE\?image=COLUMN&text=COLUMN\.$"):
        registry.load(f"retrieval/csv:{table_of_pairs}", SIZE)


def test_a_set_of_pairs_has_the_same_columns_for_every_model(pairs, tmp_path):
    """Keywords and columns of the training pairs, as the demo has them, are not those of the set."""
    (tmp_path / "mine.csv").write_text(f"image,text,a\n{pairs / '000.png'},a picture,another\n")
    data = DataConfig(image_column="drawing", text_columns=("title", "a"), caption_transform="a:b:tags")
    for columns, captions in {"": ["a picture"], "?text=a": ["another"], "?image=image&text=a": ["another"]}.items():
        assert registry.load(f"retrieval/csv:{tmp_path}/mine.csv{columns}", SIZE, data=data).captions == [captions]


def test_a_column_whose_name_ends_like_a_weight(pairs, tmp_path):
    (tmp_path / "x.csv").write_text(f"image,title,title:2\n{pairs / '000.png'},one,two\n")
    for column, caption in (("title", "one"), ("title:2", "two")):
        assert registry.load(f"retrieval/csv:{tmp_path}/x.csv?text={column}", SIZE).captions == [[caption]]


def test_rows_of_one_image_are_one_item_with_all_their_captions(tmp_path):
    """Like Flickr8k's: a row per caption, all of which count, equal ones too."""
    folder, again = tiny.folder(tmp_path / "pairs", 6), tmp_path / "again.csv"
    images = sorted(folder.glob("*.png"))
    rows = [f"{image},{words} of {i % 6}" for words in ("side", "top") for i, image in enumerate(images)]
    again.write_text("\n".join(["image,text", *rows, rows[0]]) + "\n")
    data = registry.load(f"retrieval/csv:{again}", SIZE)
    expected = [[f"side of {i}", f"top of {i}"] for i in range(6)]
    expected[0].append("side of 0")
    assert data.captions == expected and len(data.images) == 6
    np.testing.assert_array_equal(data.images[1], Preprocessing(SIZE)(images[1].read_bytes()))
    match = retrieval.Matches(data.captions).of_images()
    assert match.shape == (6, 13) and (match.sum(axis=0) == 1).all() and match.sum(axis=1).tolist() == [3, *[2] * 5]
    copied = shutil.copytree(folder, tmp_path / "copied")  # the same images in another source of the same run
    whole = DataConfig(sources=(f"folder:{folder}", f"folder:{copied}"), holdout=1.0)
    twice = registry.load("retrieval/holdout", SIZE, data=whole)
    single = registry.load(f"retrieval/folder:{folder}", SIZE)
    assert len(twice.images) == 6 and twice.captions == [2 * texts for texts in single.captions]


def test_an_image_without_captions_is_named():
    with pytest.raises(UserError, match=r"^set: record 1 has no caption"):
        custom.captioned("set", [b"", b""], [["a"], []], ["a", "b"], Preprocessing(SIZE), PROFILES["openai"])


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
    other = shutil.copytree(run, tmp_path / "run")
    for at in (f"@{other}", "@/nowhere", "@", ""):
        fault = "'/nowhere' is not the folder of a run" if "nowhere" in at else ""
        with pytest.raises(UserError, match=rf"^retrieval/holdout{at}: .*{fault}.*retrieval/holdout@RUN"):
            registry.load(f"retrieval/holdout{at}", SIZE)
    content = json.loads((other / "config.json").read_text())
    content["config"]["data"] |= {"sources": [spec], "holdout": SHARE}
    (other / "config.json").write_text(json.dumps(content))
    same = registry.load(f"retrieval/holdout@{other}", SIZE)
    assert same.captions == own.captions and same.card.split_hash == own.card.split_hash
    content["config"]["data"] |= {"sources": ["tfds:none/train"], "dir": "/old"}  # of another machine
    (other / "config.json").write_text(json.dumps(content))
    for family, place in itertools.product(("retrieval", "zeroshot"), ("/new", "")):
        with pytest.raises(UserError, match=f"--data_dir={place or '/old'}"):
            registry.load(f"{family}/holdout@{other}", SIZE, place, data=DataConfig(dir="/own"))
    content["config"]["data"]["held_out"] = 0.5
    (other / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"holdout@.*: the config of .* cannot be read .*held_out"):
        registry.load(f"retrieval/holdout@{other}", SIZE)


def test_a_path_of_own_pairs_needs_no_kind_before_it(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my, pairs").symlink_to(pairs)
    (tmp_path / "a.csv").write_text(f"path,caption\n{pairs / '000.png'},a picture\n")
    for path, kind in (("my, pairs", "folder"), ("a.csv?image=path&text=caption", "csv")):
        (name,) = registry.expand_suites([f"retrieval/{path}"])
        loaded = registry.load(name, SIZE)
        assert loaded.name == f"{kind}:{path}"
        assert loaded.card.split_hash == registry.load(f"retrieval/{kind}:{path}", SIZE).card.split_hash
    with pytest.raises(UserError, match="'/no/pairs'"):
        registry.check("retrieval//no/pairs")


# --- labelled images of one's own


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
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


def profile_with(templates, path):
    return dataclasses.replace(PROFILES["openai"], templates=tuple(templates), names=read_class_names(str(path)))


def test_own_templates_and_names(classes, tmp_path, capsys):
    path = tmp_path / "names.json"
    path.write_text('{"red_fox": ["fox", "vixen"]}')
    profile = profile_with(["art of a {c}", "{c}!"], path)
    data = registry.load(f"folder:{classes}", SIZE, profile=profile)
    assert data.prompts == [["art of a hen", "hen!"], ["art of a fox", "fox!", "art of a vixen", "vixen!"]]
    templates = data.card.templates
    assert templates.startswith("art of a {c} | {c}!; own names ")
    path.write_text('{"red_fox": "vixen"}')  # so that --compare refuses results by other names
    profile = profile_with(["art of a {c}", "{c}!"], path)
    assert registry.load(f"folder:{classes}", SIZE, profile=profile).card.templates != templates
    plain = registry.load(f"folder:{classes}", SIZE)
    unknown = dataclasses.replace(PROFILES["openai"], names={"owl": "owl", "elk": "elk"})
    data = registry.load(f"folder:{classes}", SIZE, profile=unknown)
    assert data.prompts == plain.prompts and data.card == plain.card
    said = "none of the class names, such as 'elk', is among its 2 classes, such as 'hen'; its labels are used"
    assert said in capsys.readouterr().out
    for content, message in {
        '{"hen": 3}': "expected JSON, {label: name}",
        "{": "cannot be read",
    }.items():
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            registry.load(f"folder:{classes}", SIZE, profile=profile_with([], path))
    with pytest.raises(UserError, match=r"template 'a fox' has no \{c\}"):
        dataclasses.replace(PROFILES["openai"], templates=["a fox"])


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

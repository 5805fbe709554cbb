"""Sets of texts to choose from, in the layouts of their authors, and from tables and the Hub."""

import datetime
import json

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.encoding import SIZE, make_encoder, small_model
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.prompts import PROFILES, Profile
from xclip_jax.evaluators.sets import choice_sets


def load(spec, **options):
    registry.check(spec)
    return registry.load(spec, SIZE, **options)


def picture(path, seed=0, shape=(12, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return pixels


def evaluate(data):
    return registry.evaluator(make_encoder(), data).run(small_model()[1])


@pytest.fixture
def sugarcrepe(tmp_path):
    """As in the repository's data/*.json, beside COCO's folder; numbers of the records are not contiguous."""
    for part, count in {"add_att": 3, "swap_obj": 2}.items():
        records = {
            str(2 * i): {"filename": f"{i % 2:012}.jpg", "caption": f"{part} {i}", "negative_caption": f"wrong {i}"}
            for i in range(count)
        }
        (tmp_path / f"{part}.json").write_text(json.dumps(records))
    for part in ("add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att"):
        record = {"filename": "000000000001.jpg", "caption": part, "negative_caption": "no"}
        (tmp_path / f"{part}.json").write_text(json.dumps({"0": record}))
    for i in range(2):
        picture(tmp_path / "val2017" / f"{i:012}.jpg", i)
    return tmp_path


def test_sugarcrepe(sugarcrepe):
    data = load(f"sugarcrepe/add_att@{sugarcrepe}")
    assert [list(texts) for texts in data.texts] == [[f"add_att {i}", f"wrong {i}"] for i in range(3)]
    assert len(data.images) == 2 and data.pictures.tolist() == [[0], [1], [0]] and not data.groups
    assert (data.card.data, data.card.metric) == ("sugarcrepe/add_att", "accuracy")
    metrics = evaluate(data)
    assert f"choice/sugarcrepe/add_att@{sugarcrepe}/accuracy" in metrics
    whole = load(f"sugarcrepe@{sugarcrepe}")
    assert {part: int(mask.sum()) for part, mask in whole.groups.items()} == {
        "add_att": 3, "add_obj": 1, "replace_att": 1, "replace_obj": 1, "replace_rel": 1, "swap_att": 1, "swap_obj": 2
    }  # fmt: skip
    assert f"choice/sugarcrepe@{sugarcrepe}/swap_obj/accuracy" in evaluate(whole)
    assert whole.card.split_hash != data.card.split_hash


def test_texts_follow_the_command_but_not_the_prefix_of_the_profile(sugarcrepe):
    spec = f"sugarcrepe/swap_obj@{sugarcrepe}"
    assert load(spec, profile=PROFILES["openai"]).texts[1] == ["swap_obj 1", "wrong 1"]
    changed = load(spec, profile=Profile(prefix="A photo of ", lower=True, captions=1))
    assert changed.texts[1] == ["A photo of swap_obj 1", "A photo of wrong 1"]
    assert changed.card.templates == "A photo of TEXT"


def aro(folder, name):
    records = []
    relations = ["on", "near", "on", "to the left of"]
    for i in range(30):
        picture(folder / "images" / f"{i}.jpg", i)
        record = {
            "image_id": str(i), "image_path": f"{i}.jpg", "bbox_x": 3 + (i == 1) * 10, "bbox_y": 2, "bbox_w": 9,
            "bbox_h": 8, "true_caption": f"the cat is on mat {i}", "false_caption": f"mat {i} is on the cat",
        }  # fmt: skip
        own = {"relation_name": relations[i % 4]} if name == "relation" else {
            "attributes": ["white", "old"] if i < 26 else ["old", "white"], "obj1_name": "cat", "obj2_name": "mat"
        }  # fmt: skip
        records.append(record | own)
    (folder / f"visual_genome_{name}.json").write_text(json.dumps(records))


def test_aros_relations(tmp_path):
    """Macro accuracy as its notebook has it, without symmetric relations; images are cut as Pillow's crop does."""
    aro(tmp_path, "relation")
    data = load(f"aro/vg_relation@{tmp_path}")
    assert data.texts[3] == ["the cat is on mat 3", "mat 3 is on the cat"] and len(data.images) == 30
    assert {part: int(mask.sum()) for part, mask in data.groups.items()} == {"on": 15, "to the left of": 7}
    for i in (0, 1):  # the second box reaches beyond the image
        with PIL.Image.open(tmp_path / "images" / f"{i}.jpg") as image:
            part = image.crop((3 + 10 * i, 2, 12 + 10 * i, 10))
        prepare = PROFILES["openai"].preprocessing(Preprocessing(SIZE))
        np.testing.assert_array_equal(data.images[i], prepare(np.asarray(part)))
    results = registry.measure(registry.evaluator(make_encoder(), data), small_model()[1])
    by_key = {result.key: result for result in results}
    right = by_key["accuracy"].items.values
    macro = np.mean([right[mask].mean() for mask in data.groups.values()])
    assert by_key["macro_accuracy"].value == pytest.approx(100 * macro) and by_key["macro_accuracy"].headline
    assert "macro_accuracy" in {result.key for result in results if result.items is not None}


def test_aros_pairs_of_attributes_need_25_items(tmp_path):
    aro(tmp_path, "attribution")
    data = load(f"aro/vg_attribution@{tmp_path}")
    assert {part: int(mask.sum()) for part, mask in data.groups.items()} == {"white_old": 26}


def test_boxes_belong_to_the_identity_and_those_of_one_image_are_resampled_together(tmp_path):
    aro(tmp_path, "relation")
    before = load(f"aro/vg_relation@{tmp_path}")
    path = tmp_path / "visual_genome_relation.json"
    content = path.read_text()
    path.write_text(content.replace('"bbox_w": 9', '"bbox_w": 8'))
    assert load(f"aro/vg_relation@{tmp_path}").card.split_hash != before.card.split_hash
    path.write_text(content.replace('"image_path": "1.jpg"', '"image_path": "0.jpg"'))
    data = load(f"aro/vg_relation@{tmp_path}")
    assert len(data.images) == 30 and data.together[:3].tolist() == [0, 0, 1] and before.together is None


def test_damaged_layouts(sugarcrepe, tmp_path):
    (sugarcrepe / "val2017" / f"{1:012}.jpg").unlink()
    with pytest.raises(UserError, match=r"sugarcrepe: .* is not in the published layout .*000000000001\.jpg"):
        load(f"sugarcrepe@{sugarcrepe}")
    for content in ("[]", "{}"):
        (sugarcrepe / "add_att.json").write_text(content)
        with pytest.raises(UserError, match="sugarcrepe/add_att"):
            load(f"sugarcrepe/add_att@{sugarcrepe}")
    with pytest.raises(UserError, match=r"aro/vg_relation: .*visual_genome_relation\.json"):
        load(f"aro/vg_relation@{tmp_path}")
    for spec in ("sugarcrepe", "sugarcrepe/add@x", "aro@x", "winoground@"):
        with pytest.raises(UserError, match="unknown evaluation set"):
            registry.check(spec)


# Tables and the Hub.


@pytest.fixture
def table(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png", i)
    rows = [
        "file,good,bad,worse,kind",
        *(f'{i}.png,"a {i}, b",c {i},{"" if i == 2 else f"d {i}"},k{i % 2}' for i in range(4)),
    ]
    path = tmp_path / "items.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_rows_of_a_table(table):
    data = load(f"choice/csv:{table}?image=file&text=good&text=bad&text=worse&group=kind")
    assert [list(texts) for texts in data.texts] == [
        ["a 0, b", "c 0", "d 0"], ["a 1, b", "c 1", "d 1"], ["a 2, b", "c 2"], ["a 3, b", "c 3", "d 3"]
    ]  # fmt: skip
    assert list(data.groups) == ["k0", "k1"] and data.card.metric == "accuracy"
    results = registry.measure(registry.evaluator(make_encoder(), data), small_model()[1])
    chance = {result.key: result.chance for result in results}
    assert chance["accuracy"] == pytest.approx(100 * (1 / 3 + 1 / 3 + 1 / 2 + 1 / 3) / 4)
    with pytest.raises(UserError, match=r"no column 'image'; .*; name its columns"):
        load(f"choice/csv:{table}", data=DataConfig(image_column="file", text_columns=("good", "bad")))


@pytest.mark.parametrize(
    "values, parts",
    [
        ([3, 1, 3, None], {"3": [0, 2], "1": [1]}),
        ([True, False, True, None], {"True": [0, 2], "False": [1]}),
        ([0.5, 1.0, None, 0.5], {"0.5": [0, 3], "1.0": [1]}),
        ([datetime.date(2024, 1, 2)] * 3 + [None], {"2024-01-02": [0, 1, 2]}),
        ([["b", "a"], [], ["b", "a"], None], {"b, a": [0, 2]}),
        ([[1, 2], [1], [1, 2], None], {"1, 2": [0, 2], "1": [1]}),
        ([{"of": 1}, {"of": 2}, {"of": None}, None], {"1": [0], "2": [1]}),
    ],
)
def test_parts_are_the_texts_of_any_values(table, values, parts):
    columns = {"image": [str(table.parent / f"{i}.png") for i in range(4)], "good": list("abcd"), "bad": list("efgh")}
    path = table.with_name("items.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns | {"kind": values}), path)
    key = "kind/of" if isinstance(values[0], dict) else "kind"
    data = load(f"choice/parquet:{path}?image=image&text=good&text=bad&group={key}")
    assert {part: np.flatnonzero(mask).tolist() for part, mask in data.groups.items()} == parts


def test_a_part_in_another_encoding(table):
    table.write_bytes("file,good,bad,kind\n0.png,a,b,é\n".encode("latin-1"))
    with pytest.raises(BadSample, match="not UTF-8"):
        load(f"choice/csv:{table}?image=file&text=good&text=bad&group=kind")


def test_rows_that_name_one_file_are_resampled_together_and_encode_it_once(table):
    table.write_text("file,good,bad\n0.png,a 0,c 0\n0.png,a 2,c 2\n1.png,a 1,c 1\n")
    data = load(f"choice/csv:{table}?image=file&text=good&text=bad")
    assert data.pictures.tolist() == [[0], [0], [1]] and len(data.images) == 2
    for number in (0, 1):
        with PIL.Image.open(table.parent / f"{number}.png") as image:
            expected = PROFILES["openai"].preprocessing(Preprocessing(SIZE))(np.asarray(image))
        np.testing.assert_array_equal(data.images[number], expected)
    results = registry.measure(registry.evaluator(make_encoder(), data), small_model()[1])
    (accuracy,) = (result for result in results if result.key == "accuracy")
    assert accuracy.items.groups.tolist() == [0, 0, 1]


def test_rows_without_a_right_answer_are_left_out(table, capsys):
    """The wrong text equals the right one; with --lower also if it differs in capitals. Published sets keep theirs."""
    table.write_text("file,good,bad,worse,kind\n0.png,a,b,a,x\n1.png,c,d,,y\n2.png,E,e,f,y\n3.png,g,h,i,y\n")
    spec = f"choice/csv:{table}?image=file&text=good&text=bad&text=worse&group=kind"
    data = load(spec)
    said = "1 of the 4 rows left out: the right text is among the wrong ones, first in row 0, 'a'"
    assert said in capsys.readouterr().out
    assert [texts[0] for texts in data.texts] == ["c", "E", "g"] and data.pictures.tolist() == [[1], [2], [3]]
    assert {part: mask.tolist() for part, mask in data.groups.items()} == {"y": [True] * 3}
    results = registry.measure(registry.evaluator(make_encoder(), data), small_model()[1])
    assert {result.n for result in results if result.key == "accuracy"} == {3}
    lower = load(spec, profile=Profile(prefix="", lower=True))
    assert [texts[0] for texts in lower.texts] == ["c", "g"] and lower.card.split_hash != data.card.split_hash
    with pytest.raises(UserError, match="0 items"):
        load(f"choice/csv:{table}?image=file&text=good&text=good")


def test_published_items_without_a_right_answer_count_as_wrong(sugarcrepe, capsys):
    record = {"filename": "000000000001.jpg", "caption": "same", "negative_caption": "same"}
    (sugarcrepe / "add_obj.json").write_text(json.dumps({"0": record}))
    data = load(f"sugarcrepe/add_obj@{sugarcrepe}")
    assert evaluate(data)[f"choice/{data.name}/accuracy"] == 0 and "left out" not in capsys.readouterr().out


def test_a_file_that_is_exchanged_changes_the_identity(table):
    spec = f"choice/csv:{table}?image=file&text=good&text=bad"
    before = load(spec).card.split_hash
    assert load(spec).card.split_hash == before
    (table.parent / "0.png").write_bytes((table.parent / "1.png").read_bytes() + b"more")
    assert load(spec).card.split_hash != before


def test_a_right_text_is_one(table):
    rows = [{"image": str(table.parent / f"{i}.png"), "good": ["a", "b"], "bad": ["c"]} for i in range(2)]
    path = table.with_name("lists.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match="row 0 must have one text in column 'good'"):
        load(f"choice/parquet:{path}?image=image&text=good&text=bad")


def test_an_image_that_is_missing_counts_as_wrong(table, monkeypatch):
    monkeypatch.setattr("xclip_jax.evaluators.encoder.MAX_UNREADABLE", 0.5)
    (table.parent / "1.png").unlink()
    data = load(f"choice/csv:{table}?image=file&text=good&text=bad")
    results = registry.measure(registry.evaluator(make_encoder(), data), small_model()[1])
    (accuracy,) = (result for result in results if result.key == "accuracy")
    assert accuracy.n == 4 and accuracy.items.values[1] == 0
    assert results[-1].metric == "unreadable" and results[-1].value == 1


@pytest.mark.parametrize(
    "columns, message",
    [
        ("?image=file&text=worse&text=bad", "row 2 must have one text in column 'worse'; correct or delete the row"),
        ("?image=file&text=right", "no column 'right'; .*; name its columns"),
        ("?image=file&text=good&text=bad&grup=kind", "its keys are image=COLUMN, text=COLUMN and one group=COLUMN"),
        ("?image=file&text=good&text=bad&group=kind&group=worse", "one group=COLUMN; remove all others"),
        ("?image=file&text=good", "item 0 has 1 texts, .* one image and two or more texts"),
        ("?image=file&image=file&text=good&text=bad&text=worse", "item 0 has 3 texts, .* two images and two texts"),
    ],
)
def test_columns_that_do_not_fit(table, columns, message):
    with pytest.raises(UserError, match=message):
        load(f"choice/csv:{table}{columns}")


def test_a_source_without_columns(pairs):
    with pytest.raises(UserError, match="has no columns, unlike csv:, parquet: and hf:"):
        load(f"choice/folder:{pairs}")


@pytest.fixture
def winoground(tmp_path, monkeypatch):
    """The columns of facebook/winoground, as a parquet file."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")
    datasets.disable_progress_bars()
    for i in range(10):
        picture(tmp_path / f"ex_{i // 2}_img_{i % 2}.png", i)
    columns = {
        f"image_{j}": [{"bytes": (tmp_path / f"ex_{i}_img_{j}.png").read_bytes(), "path": None} for i in range(5)]
        for j in (0, 1)
    }
    columns |= {f"caption_{j}": [f"{'ab'[j]} on {'ba'[j]} {i}" for i in range(5)] for j in (0, 1)}
    columns |= {"id": list(range(5)), "collapsed_tag": ["Object", "Relation", "Both", "Object", "Relation"]}
    rows = datasets.Dataset.from_dict(columns)
    for j in (0, 1):
        rows = rows.cast_column(f"image_{j}", datasets.Image())
    path = tmp_path / "test-00000-of-00001.parquet"
    rows.to_parquet(str(path))
    return path


def test_winoground_of_the_hub_and_of_a_file(winoground, server, monkeypatch):
    for name, value in {
        "HF_ENDPOINT": server.url,
        "HUB_DATASETS_URL": f"{server.url}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}",
        "HF_HUB_OFFLINE": False,
        "USE_PARQUET_EXPORT": False,
    }.items():
        monkeypatch.setattr(f"datasets.config.{name}", value)
    server.add("facebook/winoground", {"data/test-00000-of-00001.parquet": winoground.read_bytes()})
    of_hub, of_file = load("winoground"), load(f"winoground@parquet:{winoground}")
    for data in (of_hub, of_file):
        assert data.pictures.shape == (5, 2) and list(data.groups) == ["Object", "Relation", "Both"]
        assert data.texts[3] == ["a on b 3", "b on a 3"] and data.card.metric == "group_score"
    for i in range(5):
        for j in (0, 1):
            with PIL.Image.open(winoground.parent / f"ex_{i}_img_{j}.png") as image:
                expected = PROFILES["openai"].preprocessing(Preprocessing(SIZE))(np.asarray(image))
            np.testing.assert_array_equal(of_hub.images[of_hub.pictures[i, j]], expected)
            np.testing.assert_array_equal(of_file.images[of_file.pictures[i, j]], expected)
    assert of_hub.card.split_hash == of_file.card.split_hash
    metrics = evaluate(of_hub)
    assert metrics["choice/winoground/n"] == 5 and "choice/winoground/Object/group_score" in metrics
    other = load(f"choice/parquet:{winoground}?image=image_0&text=caption_0&text=caption_1")
    assert other.pictures.shape == (5, 1) and not other.groups


def test_the_list_of_symmetric_relations_is_complete():
    names = choice_sets._read_json(choice_sets.pathlib.Path(choice_sets.__file__).with_name("aro_symmetric.json"))
    assert len(names) == len(set(names)) == 157 and {"near", "next to", "touching"} < set(names) and "on" not in names

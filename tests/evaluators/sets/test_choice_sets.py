"""Sets of texts to choose from, in the layouts of their authors, and from tables and the Hub."""

import json

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from tests.evaluators.sets.test_known_sets import evaluate
from tests.helpers.encoding import SIZE, make_encoder, small_model
from xclip_jax.core.errors import UserError
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


@pytest.fixture
def sugarcrepe(tmp_path):
    """Like the repository's data/*.json, next to COCO's folder; numbers of the records are not contiguous."""
    for part in choice_sets._PARTS:
        count = {"add_att": 3, "swap_obj": 2}.get(part, 1)
        records = {
            str(2 * i): {"filename": f"{i % 2:012}.jpg", "caption": f"{part} {i}", "negative_caption": f"wrong {i}"}
            for i in range(count)
        }
        (tmp_path / f"{part}.json").write_text(json.dumps(records))
    for i in range(2):
        picture(tmp_path / "val2017" / f"{i:012}.jpg", i)
    return tmp_path


def test_sugarcrepe(sugarcrepe):
    data = load(f"sugarcrepe@{sugarcrepe}")
    assert [list(texts) for texts in data.texts[:3]] == [[f"add_att {i}", f"wrong {i}"] for i in range(3)]
    assert len(data.images) == 2 and data.pictures[:4].tolist() == [[0], [1], [0], [0]]
    assert (data.card.data, data.card.metric) == ("sugarcrepe", "accuracy")
    assert {part: int(mask.sum()) for part, mask in data.groups.items()} == {
        "add_att": 3, "add_obj": 1, "replace_att": 1, "replace_obj": 1, "replace_rel": 1, "swap_att": 1, "swap_obj": 2
    }  # fmt: skip
    assert f"choice/sugarcrepe@{sugarcrepe}/swap_obj/accuracy" in evaluate(data)
    # Texts follow the command, but not the prefix of the profile.
    assert load(data.name, profile=PROFILES["openai"]).texts[9] == ["swap_obj 1", "wrong 1"]
    changed = load(data.name, profile=Profile(prefix="A photo of ", lower=True, captions=1))
    assert changed.texts[9] == ["A photo of swap_obj 1", "A photo of wrong 1"]
    assert changed.card.templates == "A photo of TEXT" and changed.card.split_hash != data.card.split_hash
    # Published items without a right answer count as wrong.
    record = {"filename": "000000000001.jpg", "caption": "same", "negative_caption": "same"}
    (sugarcrepe / "add_obj.json").write_text(json.dumps({"0": record}))
    assert evaluate(load(data.name))[f"choice/{data.name}/add_obj/accuracy"] == 0


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
    with pytest.raises(UserError, match=r"^sugarcrepe: .* is not in the published layout .*000000000001\.jpg"):
        load(f"sugarcrepe@{sugarcrepe}")
    (sugarcrepe / "add_att.json").write_text("[]")
    with pytest.raises(UserError, match=r"^sugarcrepe: .* is not in the published layout"):
        load(f"sugarcrepe@{sugarcrepe}")
    with pytest.raises(UserError, match=r"^aro/vg_relation: .*visual_genome_relation\.json"):
        load(f"aro/vg_relation@{tmp_path}")
    for spec in ("sugarcrepe", "sugarcrepe/add_att@x", "aro@x", "winoground@"):
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


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ([3, 1, 3, None], {"3": [0, 2], "1": [1]}),
        ([["b", "a"], [], ["b", "a"], None], {"b, a": [0, 2]}),
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


def test_rows_that_name_one_file_are_resampled_together_and_encode_it_once(table):
    table.write_text("file,good,bad\n0.png,a 0,c 0\n0.png,a 2,c 2\n1.png,a 1,c 1\n")
    data = load(f"choice/csv:{table}?image=file&text=good&text=bad")
    assert data.pictures.tolist() == [[0], [0], [1]] and data.together.tolist() == [0, 0, 1]
    assert len(data.images) == 2


def test_images_in_a_table_are_resampled_together_like_files(table):
    images = [(table.parent / f"{i}.png").read_bytes() for i in (0, 1, 0)]
    path = table.with_name("items.parquet")
    columns = {"image": [*images, None, None], "good": list("abcde"), "bad": list("fghij")}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    data = load(f"choice/parquet:{path}?image=image&text=good&text=bad")
    assert data.together.tolist() == [0, 1, 0, 2, 3] and len(data.images) == 4


def test_rows_that_share_their_second_image_are_resampled_together(table):
    table.write_text("file,other,good,bad\n0.png,3.png,a,b\n1.png,3.png,c,d\n2.png,2.png,e,f\n")
    data = load(f"choice/csv:{table}?image=file&image=other&text=good&text=bad")
    assert data.together.tolist() == [0, 0, 1]


def test_rows_without_a_right_answer_are_left_out(table, capsys):
    """The wrong text equals the right one; with --lower also if it differs in capitals."""
    table.write_text("file,good,bad,worse,kind\n0.png,a,b,a,x\n1.png,c,d,,y\n2.png,E,e,f,y\n3.png,g,h,i,y\n")
    spec = f"choice/csv:{table}?image=file&text=good&text=bad&text=worse&group=kind"
    data = load(spec)
    assert "1 of the 4 rows left out" in capsys.readouterr().out
    assert [texts[0] for texts in data.texts] == ["c", "E", "g"] and data.pictures.tolist() == [[1], [2], [3]]
    assert {part: mask.tolist() for part, mask in data.groups.items()} == {"y": [True] * 3}
    lower = load(spec, profile=Profile(prefix="", lower=True))
    assert [texts[0] for texts in lower.texts] == ["c", "g"] and lower.card.split_hash != data.card.split_hash
    with pytest.raises(UserError, match="0 items"):
        load(f"choice/csv:{table}?image=file&text=good&text=good")


def test_a_file_that_is_exchanged_changes_the_identity(table):
    spec = f"choice/csv:{table}?image=file&text=good&text=bad"
    before = load(spec).card.split_hash
    assert load(spec).card.split_hash == before
    (table.parent / "0.png").write_bytes((table.parent / "1.png").read_bytes() + b"more")
    assert load(spec).card.split_hash != before


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ("?image=file&text=worse&text=bad", "row 2 must have one text in column 'worse'"),
        ("?image=file&text=right", "no column 'right'"),
        ("?image=file&text=good&text=bad&grup=kind", "one group"),
        ("?image=file&text=good&text=bad&group=kind&group=worse", "one group"),
        ("?image=file&text=good", r"4 items with 4 images; item 0 has the texts \['a 0, b'\]; an item is"),
        ("?image=file&text=good&text=worse", r"item 2 has the texts \['a 2, b'\]"),
        ("?image=file&image=file&text=good&text=bad&text=worse", "4 items with 8 images"),
        ("", "no column 'image'"),
    ],
)
def test_columns_that_do_not_fit(table, columns, named):
    with pytest.raises(UserError, match=f"{table}.*{named}"):
        load(f"choice/csv:{table}{columns}", data=DataConfig(image_column="file", text_columns=("good", "bad")))


def test_a_file_name_in_another_encoding(table):
    table.write_bytes(table.read_bytes().replace(b"2.png", b"caf\xe9.png"))
    with pytest.raises(UserError, match=r"not UTF-8: b'caf\\xe9\.png'"):
        load(f"choice/csv:{table}?image=file&text=good&text=bad")


def test_a_source_without_columns(pairs):
    with pytest.raises(UserError, match="has no columns"):
        load(f"choice/folder:{pairs}")


@pytest.fixture
def winoground(tmp_path, monkeypatch):
    """The columns of facebook/winoground, as a parquet file."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")
    datasets.disable_progress_bars()
    columns = {"id": list(range(5)), "collapsed_tag": ["Object", "Relation", "Both", "Object", "Relation"]}
    for j in (0, 1):
        files = [tmp_path / f"ex_{i}_img_{j}.png" for i in range(5)]
        for i, file in enumerate(files):
            picture(file, 2 * i + j)
        columns[f"image_{j}"] = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        columns[f"caption_{j}"] = [f"{'ab'[j]} on {'ba'[j]} {i}" for i in range(5)]
    path = tmp_path / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_winoground_of_the_hub_and_of_a_file(winoground, server, monkeypatch):
    server.of_datasets(monkeypatch)
    server.add("facebook/winoground", {"data/test-00000-of-00001.parquet": winoground.read_bytes()})
    data = load("winoground")
    assert data.card.split_hash == load(f"winoground@parquet:{winoground}").card.split_hash
    assert data.pictures.shape == (5, 2) and list(data.groups) == ["Object", "Relation", "Both"]
    assert data.texts[3] == ["a on b 3", "b on a 3"] and data.card.metric == "group_score"
    for i, j in np.ndindex(5, 2):
        with PIL.Image.open(winoground.parent / f"ex_{i}_img_{j}.png") as image:
            expected = PROFILES["openai"].preprocessing(Preprocessing(SIZE))(np.asarray(image))
        np.testing.assert_array_equal(data.images[data.pictures[i, j]], expected)
    metrics = evaluate(data)
    assert metrics["choice/winoground/n"] == 5 and "choice/winoground/Object/group_score" in metrics

import json

import numpy as np
import PIL.Image
import pytest

from tests.encoding import SIZE, make_encoder, small_model
from xclip_jax.errors import UserError
from xclip_jax.evaluators import files, sets
from xclip_jax.evaluators.names import Profile

PLAIN = Profile()


def load(spec, profile=PLAIN):
    sets.check(spec)
    return sets.load(spec, SIZE, profile=profile)


def evaluate(data):
    return sets.evaluator(make_encoder(), data).run(small_model()[1])


def test_a_year_of_sts(tmp_path):
    (tmp_path / "STS.input.news.txt").write_text("a cat\ta dog\none\ttwo\nx y\tx z\n")
    (tmp_path / "STS.gs.news.txt").write_text("4.2\n\n1.0\n")  # nobody judged the second pair
    (tmp_path / "STS.input.web.txt").write_bytes("caf\xe9\tbar\nb\tc\n".encode("latin-1"))
    (tmp_path / "STS.gs.web.txt").write_text("5\n0\n")
    data = load(f"sts14@{tmp_path}")
    assert data.subsets == {
        "news": [("a cat", "a dog", 4.2), ("x y", "x z", 1.0)], "web": [("café", "bar", 5.0), ("b", "c", 0.0)],
    }
    metrics = evaluate(data)
    assert metrics[f"textual/sts14@{tmp_path}/pairs"] == 4 and f"textual/sts14@{tmp_path}/spearman_mean" in metrics
    assert "spearman_mean averages" in data.card.protocol and data.card.metric == "spearman_all"
    (tmp_path / "STS.gs.web.txt").write_text("5\n")
    with pytest.raises(UserError, match=r"has 2 pairs and .* 1 lines"):
        load(f"sts14@{tmp_path}")


def test_sts_benchmark_and_sick(tmp_path):
    path = tmp_path / "sts-test.csv"
    path.write_text('main\tMSR\t2012\t0001\t5.000\tA "cat.\tA kitty.\nmain\tMSR\t2012\t0002\t0.5\tB\tC\textra\n')
    assert load(f"stsb@{path}").subsets[""] == [('A "cat.', "A kitty.", 5.0), ("B", "C", 0.5)]
    path = tmp_path / "SICK_test_annotated.txt"
    path.write_text("pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
                    "6\tA man\tA woman\t3.3\tNEUTRAL\n7\tX\tY\t1\tNEUTRAL\n")
    data = load(f"sickr@{path}")
    assert data.subsets[""] == [("A man", "A woman", 3.3), ("X", "Y", 1.0)] and evaluate(data)


def test_senteval(tmp_path):
    (tmp_path / "custrev.neg").write_text("".join(f"bad {i}\n" for i in range(20)))
    (tmp_path / "custrev.pos").write_text("".join(f"zzz {i}\n" for i in range(20)))
    data = load(f"cr@{tmp_path}")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [32, 4, 4]
    for texts, labels in zip((data.train, data.validation, data.test), data.tasks[""], strict=True):
        assert [text.startswith("zzz") for text in texts] == labels.astype(bool).tolist()
    assert len({*data.train, *data.validation, *data.test}) == 40
    assert evaluate(data)[f"textual/cr@{tmp_path}/linear/top1"] == 100


def test_glue(tmp_path):
    rows = [f"{word} {i}\t{label}" for i in range(10) for word, label in (("aaa", 0), ("zzz", 1))]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    metrics = evaluate(load(f"glue/sst2@{tmp_path}"))
    name = f"textual/glue/sst2@{tmp_path}"
    assert metrics[f"{name}/linear/top1"] == metrics[f"{name}/linear/f1"] == 100
    assert metrics[f"{name}/linear/matthews"] == pytest.approx(100) and metrics[f"{name}/n"] == 20


def test_glue_without_header_and_of_two_sentences(tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("gj04\t1\t\tA good one.\ngj04\t0\t*\tOne bad a.\n")
    cola = load(f"glue/cola@{tmp_path}")
    assert cola.train == ["A good one.", "One bad a."] and cola.tasks[""][0].tolist() == [1, 0]
    assert cola.card.metric == "linear/matthews"
    for name in ("train", "dev_matched"):
        (tmp_path / f"{name}.tsv").write_text(
            "sentence1\tsentence2\tgold_label\na\tb\tneutral\nc\td\tcontradiction\ne\tf\tentailment\n"
        )
    mnli = load(f"glue/mnli@{tmp_path}")
    assert mnli.test[0] == "a b" and mnli.tasks[""][2].tolist() == [2, 0, 1]


@pytest.fixture
def karpathy(tmp_path):
    records = []
    for i, (split, count) in enumerate([("test", 7), ("train", 5), ("test", 1), ("test", 5)]):
        place = "val2014" if i % 2 else ""
        (tmp_path / place).mkdir(exist_ok=True)
        PIL.Image.fromarray(np.full((12, 16, 3), 10 * i, np.uint8)).save(tmp_path / place / f"{i}.png")
        sentences = [{"raw": f"A Caption {i} {j}.", "tokens": []} for j in range(count)]
        records.append({"filename": f"{i}.png", "filepath": place, "split": split, "sentences": sentences})
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": records, "dataset": "coco"}))
    return path


def test_karpathys_split(karpathy):
    data = load(f"coco_retrieval@{karpathy}")
    assert [len(captions) for captions in data.captions] == [7, 1, 5]
    assert [image[0, 0, 0] for image in data.images] == [0, 20, 30]
    assert data.captions[1] == ["A Caption 2 0."] and data.card.split == "Karpathy test"
    metrics = evaluate(data)
    assert metrics[f"retrieval/coco_retrieval@{karpathy}/captions"] == 13
    five = load(f"coco_retrieval@{karpathy}", Profile(captions=5, lower=True, prefix="a photo of "))
    assert [len(captions) for captions in five.captions] == [5, 1, 5]
    assert five.captions[1] == ["a photo of a caption 2 0."] and five.card.split_hash != data.card.split_hash
    assert "first 5 captions" in five.card.protocol and "lower case" in five.card.protocol


def test_coco_of_tfds(monkeypatch):
    picture = np.zeros((9, 9, 3), np.uint8)
    source = [{"image": picture, "image/id": i, "captions": {"text": [b"one", b"two"]}} for i in range(3)]
    monkeypatch.setattr(files, "open_tfds", lambda *_: (source, type("Info", (), {"version": "1.1.0"})))
    data = load("coco_retrieval")
    assert data.captions == [["one", "two"]] * 3 and data.card.version == "1.1.0"
    assert "coco_retrieval" in sets.SUITES["paper"]


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("sts12@{}", None, "holds no STS.input"),
        ("stsb@{}/x", "a\tb\n", "7 columns"),
        ("stsb@{}/x", "a\tb\tc\td\tfive\tf\tg\n", "not of the published layout"),
        ("stsb@{}/y", "", "does not exist"),
        ("sickr@{}/x", "a\tb\n1\t2\n", "columns sentence_A"),
        ("mr@{}", None, "rt-polarity.neg' does not exist"),
        ("glue/sst2@{}", None, "train.tsv' does not exist"),
        ("coco_retrieval@{}/x", "[]", "no Karpathy JSON"),
        ("coco_retrieval@{}/y", "", "no Karpathy JSON"),
        ("flickr30k_retrieval@{}/x", '{"images": [{"filename": "a.jpg", "split": "test", "sentences": []}]}', "a.jpg"),
    ],
)
def test_wrong_files_are_one_sentence(spec, content, message, tmp_path):
    if content is not None:
        (tmp_path / "x").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load(spec.format(tmp_path))
    assert "\n" not in str(error.value)

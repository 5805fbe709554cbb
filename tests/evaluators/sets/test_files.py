import dataclasses
import gzip
import json

import numpy as np
import pytest

from tests.evaluators.sets.test_known_sets import evaluate, write
from tests.helpers.encoding import SIZE
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.probe import Sweep
from xclip_jax.evaluators.prompts import Profile
from xclip_jax.evaluators.sets import files

PLAIN = Profile()


def load(spec, profile=PLAIN):
    registry.check(spec)
    return registry.load(spec, SIZE, profile=profile)


def test_a_year_of_sts(tmp_path):
    (tmp_path / "STS.input.news.txt").write_text("a cat\ta dog\none\ttwo\nx y\tx z\n")
    (tmp_path / "STS.gs.news.txt").write_text("4.2\n\n1.0\n")  # nobody judged the second pair
    (tmp_path / "STS.input.web.txt").write_bytes("caf\xe9\tbar\nb\tc\n".encode("latin-1"))
    (tmp_path / "STS.gs.web.txt").write_text("5\n0\n")
    data = load(f"sts14@{tmp_path}")
    assert data.subsets == {
        "news": [("a cat", "a dog", 4.2), ("x y", "x z", 1.0)],
        "web": [("café", "bar", 5.0), ("b", "c", 0.0)],
    }
    metrics = evaluate(data)
    assert metrics[f"textual/sts14@{tmp_path}/pairs"] == 4 and f"textual/sts14@{tmp_path}/spearman_mean" in metrics
    assert "spearman_mean averages" in data.card.protocol and data.card.metric == "spearman_all"
    (tmp_path / "STS.gs.web.txt").write_text("5\n")
    with pytest.raises(UserError, match=r"sts14: .* is not in the published layout"):
        load(f"sts14@{tmp_path}")


def test_sts_benchmark_and_sick(tmp_path):
    path = tmp_path / "sts-test.csv"
    path.write_text('main\tMSR\t2012\t0001\t5.000\tA "cat.\tA kitty.\nmain\tMSR\t2012\t0002\t0.5\tB\tC\textra\n')
    assert load(f"stsb@{path}").subsets[""] == [('A "cat.', "A kitty.", 5.0), ("B", "C", 0.5)]
    path = tmp_path / "SICK_test_annotated.txt"
    path.write_text(
        "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
        "6\tA man\tA woman\t3.3\tNEUTRAL\n7\tX\tY\t1\tNEUTRAL\n"
    )
    data = load(f"sickr@{path}")
    assert data.subsets[""] == [("A man", "A woman", 3.3), ("X", "Y", 1.0)] and evaluate(data)


def test_senteval(tmp_path):
    (tmp_path / "custrev.neg").write_text("".join(f"bad {i}\n" for i in range(12)))
    (tmp_path / "custrev.pos").write_text("".join(f"zzz {i}\n" for i in range(12)))
    data = load(f"cr@{tmp_path}")
    assert (len(data.train), len(data.validation), len(data.test), data.folds) == (24, 0, 0, 10)
    assert [text.startswith("zzz") for text in data.train] == data.tasks[""][0].astype(bool).tolist()
    (tmp_path / "rt-polarity.neg").write_text("bad\n")
    (tmp_path / "rt-polarity.pos").write_text("")
    with pytest.raises(UserError, match="items of one class only"):
        load(f"mr@{tmp_path}")
    metrics = evaluate(dataclasses.replace(data, sweep=Sweep((1.0, 8.0), 0), folds=3))
    assert metrics[f"textual/cr@{tmp_path}/linear/top1"] == 100 and metrics[f"textual/cr@{tmp_path}/n"] == 24


SICK = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
SPLITS = {
    "sst2": (["sentiment-train", "sentiment-dev", "sentiment-test"], "", "{w} film .\t{i}\n"),
    "sst5": (["sentiment-train", "sentiment-dev", "sentiment-test"], "", "{i} {w} film .\n"),
    "trec": (["train_5500.label", "TREC_10.label"], "", "{L}:manner How {w} \xe9 ?\n"),
    "mrpc": (
        ["msr_paraphrase_train.txt", "msr_paraphrase_test.txt"],
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
        '{i}\t1\t2\t{w} "one\tzz\n',
    ),
    "sicke": (["SICK_train.txt", "SICK_trial.txt", "SICK_test_annotated.txt"], SICK, "1\t{w} man\tzz\t3.3\t{L}\n"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_sentevals_own_splits(name, tmp_path):
    files_of, head, row = SPLITS[name]
    for file in files_of:
        text = head + "".join(row.format(w="za"[i % 2] * 3, i=i % 2, L="NE"[i % 2]) for i in range(20))
        (tmp_path / file).write_bytes(text.encode("latin-1" if name == "trec" else "utf-8"))
    data = load(f"{name}@{tmp_path}")
    pair = name in ("mrpc", "sicke")
    assert data.pairs == ("difference" if pair else "") and isinstance(data.train[0], tuple) == pair
    assert (len(data.validation), data.folds) == ((0, 10) if len(files_of) == 2 else (20, 0))
    largest, fitted = (32, "") if data.folds else (8, "alone")  # as SentEval's KFoldClassifier and SplitClassifier
    assert max(data.sweep.coarse) == largest and data.sweep.refit == (not fitted)
    expected = {"trec": "How zzz é ?", "mrpc": ('zzz "one', "zz"), "sicke": ("zzz man", "zz")}.get(name, "zzz film .")
    assert data.test[0] == expected
    # TREC's and SICK's classes in alphabetical order.
    assert data.tasks[""][2][:2].tolist() == ([1, 0] if name in ("trec", "sicke") else [0, 1])
    if name in ("sst2", "mrpc"):  # without and with pairs
        metrics = evaluate(dataclasses.replace(data, sweep=Sweep((1.0, 8.0), 0), folds=2 if data.folds else 0))
        assert metrics[f"textual/{name}@{tmp_path}/linear/top1"] == 100
        assert metrics[f"textual/{name}@{tmp_path}/linear/f1"] == 100
    (tmp_path / files_of[-1]).write_text(head)
    with pytest.raises(UserError, match=f"{files_of[-1]} has no items"):
        load(f"{name}@{tmp_path}")
    (tmp_path / files_of[-1]).write_text(head + row.format(w="b", i=9, L="X"))
    with pytest.raises(UserError, match=f"{name}: .* is not in the published layout .*'[9X]'"):
        load(f"{name}@{tmp_path}")


def test_glue(tmp_path):
    rows = [f"{word} {i}\t{label}" for i in range(6) for word, label in (("aaa", 0), ("zzz", 1))]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    data = load(f"glue/sst2@{tmp_path}")
    assert max(data.sweep.coarse) == 8 and min(data.sweep.coarse) == 0.25
    metrics = evaluate(dataclasses.replace(data, sweep=Sweep((1.0, 8.0), 0)))
    expected = {"linear/top1": 100, "linear/f1": 100, "linear/matthews": 100, "n": 12}
    assert {key: metrics[f"textual/glue/sst2@{tmp_path}/{key}"] for key in expected} == pytest.approx(expected)


def test_glue_of_two_sentences(tmp_path):
    for name in ("train", "dev_matched"):
        (tmp_path / f"{name}.tsv").write_text(
            "sentence1\tsentence2\tgold_label\na\tb\tneutral\nc\td\tcontradiction\ne\tf\tentailment\n"
        )
    mnli = load(f"glue/mnli@{tmp_path}")
    assert mnli.test[0] == ("a", "b") and mnli.tasks[""][2].tolist() == [1, 2, 0]
    (tmp_path / "dev.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t0.5\na\tzz\t5\nb\tc\t1\n")
    stsb = load(f"glue/stsb@{tmp_path}")
    assert stsb.subsets[""][1] == ("a", "zz", 5.0) and stsb.card.metric == "spearman_all"
    assert f"textual/glue/stsb@{tmp_path}/pearson_all" in evaluate(stsb)
    (tmp_path / "dev.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t0.5\na\tzz\tx\n")
    with pytest.raises(UserError, match=r"dev\.tsv' .*'x'"):
        load(f"glue/stsb@{tmp_path}")


@pytest.fixture
def karpathy(tmp_path):
    records = []
    for i, (split, count) in enumerate([("test", 7), ("train", 5), ("test", 1), ("test", 5)]):
        place = "val2014" if i % 2 else ""
        write(tmp_path / place / f"{i}.png", 10 * i)
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


def test_flickr8k_equals_clip_benchmarks(karpathy, tmp_path):
    """Its table has the same captions of the same images."""
    flickr = pytest.importorskip("clip_benchmark.datasets.flickr", exc_type=ImportError)
    content = json.loads(karpathy.read_text())
    for record in content["images"]:
        (tmp_path / record.pop("filepath") / record["filename"]).rename(tmp_path / f"{record['filename'][0]}.jpg")
        record["filename"] = f"{record['filename'][0]}.jpg"
    path = tmp_path / "dataset_flickr8k.json"
    path.write_text(json.dumps(content))
    tests = [record for record in content["images"] if record["split"] == "test"]
    rows = [f"{record['filename']},{sentence['raw']}\n" for record in tests for sentence in record["sentences"]]
    (tmp_path / "flickr8k_test_karpathy.txt").write_text("image,caption\n" + "".join(rows))
    theirs = flickr.Flickr(str(tmp_path), str(tmp_path / "flickr8k_test_karpathy.txt"))
    data = load(f"flickr8k_retrieval@{path}")
    assert [theirs[i][1] for i in range(len(theirs))] == data.captions
    assert [np.asarray(theirs[i][0])[0, 0, 0] for i in range(3)] == [image[0, 0, 0] for image in data.images]


def test_coco_of_tfds(monkeypatch):
    picture = np.zeros((9, 9, 3), np.uint8)
    source = [{"image": picture, "image/id": i, "captions": {"text": [b"one", b"two"]}} for i in range(3)]
    monkeypatch.setattr(files, "open_tfds", lambda *_: (source, type("Info", (), {"version": "1.1.0"})))
    data = load("coco_retrieval")
    assert data.captions == [["one", "two"]] * 3 and data.card.version == "1.1.0"
    assert "coco_retrieval" in registry.all_suites()["paper"]


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("sts12@{}", None, "it needs two different similarities"),
        ("stsb@{}/x", "a\tb\tc\td\tnan\tf\tg\na\tb\tc\td\t1\tf\tg\n", "it needs two different similarities"),
        ("mr@{}", None, "rt-polarity.neg"),
        ("coco_retrieval@{}/x", "[]", "is not in the published layout"),
        ("flickr30k_retrieval@{}/x", '{"images": [{"filename": "a.jpg", "split": "test", "sentences": []}]}', "a.jpg"),
        ("flickr8k_retrieval@{}/x", '{"images": [{"filename": "a.jpg", "split": "val"}]}', "no image has a caption"),
    ],
)
def test_wrong_files(spec, content, message, tmp_path):
    if content is not None:
        (tmp_path / "x").write_text(content)
    with pytest.raises(UserError, match=message):
        load(spec.format(tmp_path))


# Captions in several languages.


def test_crossmodal_3600_in_one_language(tmp_path):
    records = []
    for i in range(3):
        write(tmp_path / "images" / f"{i:016x}.jpg", 10 * i)
        texts = {lang: [f"{lang} {i} {j}" for j in range(1 + i)] for lang in ("de", "quz")}
        captions = {
            lang: {"caption": c, "caption/tokenized": c, "caption/tokenized/lowercase": c} for lang, c in texts.items()
        }
        records.append({"image/key": f"{i:016x}", "image/locale": "de"} | captions)
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = load(f"xm3600/quz@{tmp_path}", Profile(published_prefix="a photo of "))
    assert data.captions == [[f"quz {i} {j}" for j in range(1 + i)] for i in range(3)]  # the prefix is English
    assert [image[0, 0, 0] for image in data.images] == [0, 10, 20] and data.card.data == "xm3600/quz"
    assert evaluate(data)[f"retrieval/xm3600/quz@{tmp_path}/captions"] == 6
    first = load(f"xm3600/de@{tmp_path}", Profile(captions=1, prefix="x "))  # clip_benchmark's protocol
    assert first.captions == [["x de 0 0"], ["x de 1 0"], ["x de 2 0"]]
    with pytest.raises(UserError, match=r"xm3600/fr: .* is not in the published layout .*'fr'"):
        load(f"xm3600/fr@{tmp_path}")
    assert registry.check(f"xm3600/de@{tmp_path}").shows(f"xm3600/de@{tmp_path}") == "captions"
    for spec in ("xm3600", "xm3600@x", "multi30k/@x", "multi30k/de"):
        with pytest.raises(UserError, match="unknown evaluation set"):
            registry.check(spec)


def test_multi30k(tmp_path):
    """Five captions of task 2 in German, one of task 1 in French, in the order of the list of images."""
    names = ["1007129816.jpg", "1009434119.jpg"]
    for folder in ("task1/raw", "task2/raw", "task1/image_splits"):
        (tmp_path / folder).mkdir(parents=True)
    for i, name in enumerate(names):
        write(tmp_path / "images" / name, 10 * i)
    (tmp_path / "task1/image_splits/test_2016_flickr.txt").write_text("".join(f"{name}\n" for name in names))
    for i in range(1, 6):
        lines = f"Ein Mann\u2028 {i}.\nZwei Männer {i}.\n"
        (tmp_path / f"task2/raw/test_2016.{i}.de.gz").write_bytes(gzip.compress(lines.encode()))
    for lang in ("de", "fr"):
        (tmp_path / f"task1/raw/test_2016_flickr.{lang}.gz").write_bytes(gzip.compress(b"Un homme.\nDeux hommes.\n"))
    german, french = (load(f"multi30k/{lang}@{tmp_path}") for lang in ("de", "fr"))
    assert german.captions[0] == [f"Ein Mann\u2028 {i}." for i in range(1, 6)] and len(german.captions) == 2
    assert french.captions == [["Un homme."], ["Deux hommes."]]
    assert [image[0, 0, 0] for image in french.images] == [0, 10]
    assert evaluate(german)[f"retrieval/multi30k/de@{tmp_path}/captions"] == 10
    with pytest.raises(UserError, match=r"multi30k/cs: .* is not in the published layout .*test_2016_flickr\.cs\.gz"):
        load(f"multi30k/cs@{tmp_path}")
    (tmp_path / "task1/raw/test_2016_flickr.fr.gz").write_bytes(gzip.compress(b"Un homme.\nDeux hommes.\n")[:-12])
    with pytest.raises(UserError, match=r"multi30k/fr: .* is not in the published layout"):
        load(f"multi30k/fr@{tmp_path}")


def test_xtd10_equals_clip_benchmarks(tmp_path, monkeypatch):
    module = pytest.importorskip("clip_benchmark.datasets.xtd10", exc_type=ImportError)
    names = ["COCO_train2014_000000061844.jpg", "COCO_val2014_000000061849.jpg"]
    (tmp_path / "XTD10").mkdir()
    (tmp_path / "XTD10/test_image_names.txt").write_text("".join(f"{name}\n" for name in names))
    languages = {"it": "XTD10", "de": "MIC", "fr": "MIC", "jp": "STAIR"}
    for language, place in languages.items():
        (tmp_path / place).mkdir(exist_ok=True)
        ending = "\r\n" if place == "XTD10" else "\n"
        lines = ending.join(f"{language} è 猫 {i} " for i in range(2))  # no newline at the end, like most files
        (tmp_path / place / f"test_1kcaptions_{language}.txt").write_bytes(lines.encode())
    for i, name in enumerate(names):
        write(tmp_path / "xtd10/images" / name, 10 * i)  # the place of its code
    (tmp_path / "images").symlink_to(tmp_path / "xtd10/images")
    addresses = "https://raw.githubusercontent.com/adobe-research/Cross-lingual-Test-Dataset-XTD10/main/"
    read = lambda url: (tmp_path / url.removeprefix(addresses)).read_bytes().decode().splitlines()  # noqa: E731
    monkeypatch.setattr(module, "_get_lines", read)
    for language in languages:
        module.create_annotation_file(str(tmp_path), language)
        theirs = module.XTD10(str(tmp_path), str(tmp_path / f"xtd10-{language}.json"))
        data = load(f"xtd10/{language}@{tmp_path}")
        assert [theirs[i][1] for i in range(2)] == data.captions and len(data.images) == 2
        assert [np.asarray(theirs[i][0])[0, 0, 0] for i in range(2)] == [image[0, 0, 0] for image in data.images]
    assert evaluate(data)[f"retrieval/xtd10/jp@{tmp_path}/captions"] == 2 and data.card.data == "xtd10/jp"
    with (tmp_path / "MIC/test_1kcaptions_fr.txt").open("a") as file:
        file.write("\nune ligne de trop")
    with pytest.raises(UserError, match=r"^xtd10/fr: .* is not in the published layout"):
        load(f"xtd10/fr@{tmp_path}")


def test_xflickrco_has_images_of_two_sets(tmp_path):
    name_of_coco = "COCO_val2014_000000413120.jpg"
    places = {"1007129816.jpg": "images", name_of_coco: "val2014"}
    records = []
    for i, (name, place) in enumerate(places.items()):
        write(tmp_path / place / name, 10 * i)
        records.append({"sentences": [f"Ein Bild\u2028 {i}."], "id": i, "img_path": name})
    (tmp_path / "annotations/de").mkdir(parents=True)
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "annotations/de/test.jsonl").write_text("\n".join(lines))
    for _ in range(2):  # all images may be in one folder
        data = load(f"xflickrco/de@{tmp_path}", Profile(published_prefix="a photo of "))
        assert data.captions == [["Ein Bild\u2028 0."], ["Ein Bild\u2028 1."]]
        assert [image[0, 0, 0] for image in data.images] == [0, 10]
        if (tmp_path / "val2014").exists():
            (tmp_path / "val2014" / name_of_coco).rename(tmp_path / "images" / name_of_coco)
            (tmp_path / "val2014").rmdir()
    with pytest.raises(UserError, match=r"^xflickrco/fr: .* is not in the published layout .*fr/test\.jsonl"):
        load(f"xflickrco/fr@{tmp_path}")

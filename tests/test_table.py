import pytest

from xclip_jax.evaluators import flat_names, summary


def zero_shot(name):
    metrics = {"n": 8.0, "ways": 4.0, "top1": 57.5, "top5": 100.0}
    return {f"zeroshot/{name}/{key}": value for key, value in metrics.items()}


def retrieval(name, chance=True):
    recalls = {f"{way}/r{k}": 60.0 + k for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    by_chance = {"image_to_text/r1": 5.0, "image_to_text/r5": 23.04, "text_to_image/r1": 5.0, "text_to_image/r5": 25.0}
    metrics = {"images": 20.0, "captions": 100.0} | recalls
    metrics |= {f"chance/{key}": value for key, value in by_chance.items()} if chance else {}
    return {f"retrieval/{name}/{key}": value for key, value in metrics.items()}


def test_without_results_nothing_is_rendered():
    assert summary.render([]) == summary.headlines([]) == "" and summary.tables([]) == []


def test_chance_of_retrieval_counts_every_caption():
    results = flat_names.read(retrieval("coco"))
    (recalls,) = [t for t in summary.tables(results) if t.title.startswith("retrieval")]
    cells = ["61.0", "(5.0)", "65.0", "(23.0)", "61.0", "(5.0)", "65.0", "(25.0)"]
    assert recalls.rows == [("coco", ["20", "100", *cells])]
    assert summary.families(results).rows == [("retrieval", ["coco", "image_to_text/r1", "61.0", "(5.0)"])]


def test_chance_of_retrieval_in_results_without_it():
    """Results of earlier versions: five captions an image, of which none is shared."""
    results = flat_names.read(retrieval("coco", chance=False))
    assert summary.families(results).rows[0][1][-1] == "(5.0)"
    (recalls, *_) = summary.tables(results)
    assert recalls.rows[0][1] == ["20", "100", "61.0", "(5.0)", "65.0", "", "61.0", "(5.0)", "65.0", ""]


def test_chance_of_a_mean_average_precision_is_not_one_over_the_classes():
    metrics = {"n": 8.0, "ways": 4.0, "map": 50.0, "map11": 51.0}
    results = flat_names.read({f"zeroshot/voc/{key}": value for key, value in metrics.items()})
    assert summary.families(results).rows == [("zero-shot classification", ["voc", "map11", "51.0", ""])]


def test_long_names_do_not_shift_the_columns():
    long = "mnist_and_more_than_that@relative/path/of/a/set/that/is/long"
    results = zero_shot(long) | zero_shot("mnist") | retrieval("coco_retrieval@pictures/of/2017/dataset_coco.json")
    lines = summary.render(flat_names.read(results)).splitlines()
    blocks = {"zero-shot": lines[:3], "retrieval": lines[3:5], "families": lines[5:]}
    assert [len(block) for block in blocks.values()] == [3, 2, 3]
    assert long in blocks["zero-shot"][1] and len({line.index("57.5") for line in blocks["zero-shot"][1:]}) == 1
    assert blocks["retrieval"][0].index("i2t@1") + 1 == blocks["retrieval"][1].index("61.0")
    assert blocks["families"][1].index("top1") == blocks["families"][2].index("image_to_text/r1")
    assert all("  " in line and " (25.0)" in line for line in blocks["zero-shot"][1:])
    assert "100.0 (100.0)" in blocks["zero-shot"][1]


def test_short_names_have_the_usual_columns():
    lines = summary.render(flat_names.read(zero_shot("mnist") | retrieval("coco"))).splitlines()
    assert lines[1].index("4") == 42 + 5 and lines[5].index("mnist") == 26 and lines[5].index("top1") == 56


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["folder:/home/me/classes", "mnist"], ["folder:classes", "mnist"]),
        (["imagenet@/data/in/val/", "csv:~/a/b.csv"], ["imagenet@val", "csv:b.csv"]),
        (["folder:/a/x/val", "folder:/a/y/val", "imagenet@/a/val"], ["folder:x/val", "folder:y/val", "imagenet@val"]),
        (["folder:/val", "folder:/a/val"], ["folder:/val", "folder:a/val"]),
        (["tar:gs://bucket/pairs/000.tar"], ["tar:000.tar"]),
        # What is no absolute path is called as the user wrote it.
        (
            ["tfds:mnist/test", "folder:own/classes", "emoji/test_line"],
            ["tfds:mnist/test", "folder:own/classes", "emoji/test_line"],
        ),
    ],
)
def test_sets_of_own_files_have_short_names(names, short):
    results = flat_names.read({key: value for name in names for key, value in zero_shot(name).items()})
    classified, *_ = summary.tables(results)
    assert [name for name, _ in classified.rows] == short
    assert summary.families(results).rows[0][1][0] == short[0]
    assert summary.headlines(results).startswith(f"{short[0]} top1 57.5")

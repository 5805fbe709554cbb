"""Data sets of the Hub by the package `datasets`: from folders, and from a stand-in of the Hub's server."""

import io

import pytest

from tests.helpers.bad_tars import jpeg
from tests.helpers.encoding import PREPARE
from xclip_jax.commands import check
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import records, sources
from xclip_jax.data.base import MissingColumnError, SourceOptions
from xclip_jax.data.readers.hub import HubPairs
from xclip_jax.evaluators import registry

datasets = pytest.importorskip("datasets")
NAMES = ["cat", "dog", "hen"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of `datasets` in an empty folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")
    datasets.disable_progress_bars()


def rows(n=12, image="image", text="text"):
    """Rows of images, captions and classes."""
    columns = {
        image: [{"bytes": jpeg(i), "path": f"{i}.png"} for i in range(n)],
        text: [f"picture {i} " for i in range(n)],
    }
    features = {image: datasets.Image(), text: datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)}
    return datasets.Dataset.from_dict(columns | {"label": [i % 3 for i in range(n)]}, datasets.Features(features))


def options(**fields):
    return SourceOptions(**fields)


def saved(path, made=None):
    (made or rows()).save_to_disk(str(path))
    return path


def test_a_folder_of_save_to_disk(tmp_path):
    source = sources.open_pairs(f"hf:{saved(tmp_path / 'set')}")
    assert len(source) == 12 and source[3] == {"image": jpeg(3), "text": ["picture 3"], "tags": [], "id": "3"}
    with pytest.raises(IndexError):
        source[12]


def test_a_column_without_images_has_bad_samples(tmp_path):
    source = sources.open_pairs(f"hf:{saved(tmp_path / 'set')}", options(image_column="label"))
    assert source.fingerprint()["samples"] == 12
    with pytest.raises(BadSample, match="no image in the row"):
        source[0]
    paths = HubPairs("ORG/NAME/train", options(), datasets.Dataset.from_dict({"image": ["a\0"], "text": ["a"]}))
    assert isinstance(records.read(paths, 0), BadSample) and paths.describe(0) == {"row": "0"}


def test_the_fingerprint_is_of_the_content(tmp_path):
    prints = [sources.open_pairs(f"hf:{saved(tmp_path / name)}").fingerprint() for name in "ab"]
    assert prints[0] == prints[1] and prints[0]["samples"] == 12
    assert prints[0]["columns"] == {"image": "image", "text": ["text"]}
    other = rows().map(lambda row, i: {"text": "another"} if i == 7 else {}, with_indices=True)
    assert sources.open_pairs(f"hf:{saved(tmp_path / 'c', other)}").fingerprint() != prints[0]
    # Rows in another order, which `datasets` stores as indices beside the same Arrow file.
    assert sources.open_pairs(f"hf:{saved(tmp_path / 'd', rows().shuffle(seed=0))}").fingerprint() != prints[0]


def test_columns_are_those_of_the_config_or_the_only_images(tmp_path):
    path = saved(tmp_path / "set", rows(image="jpg", text="txt"))
    source = sources.open_pairs(f"hf:{path}", options(text_columns=("txt",)))
    assert source[2]["image"] == jpeg(2) and source[2]["text"] == ["picture 2"]
    extra = {"json": [{"alt": f"alt {i}", "words": ["a", "b"]} for i in range(12)], "tags": ["red, blue,"] * 12}
    made = rows().add_column("json", extra["json"]).add_column("tags", extra["tags"])
    path = saved(tmp_path / "nested", made)
    keys = options(text_columns=("text", "json/alt", "json/words"), tags_key="tags")
    record = sources.open_pairs(f"hf:{path}", keys)[5]
    assert record["text"] == ["picture 5", "alt 5", "a", "b"] and record["tags"] == ["red", "blue"]
    features = datasets.Features({"image": datasets.Image()})
    named = datasets.Dataset.from_dict({"image": [{"bytes": jpeg(0), "path": "a fox.png"}]}, features)
    assert HubPairs("ORG/NAME/train", options(text_columns=("image/path",)), named)[0]["text"] == ["a fox.png"]


def test_images_that_are_paths_and_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(jpeg(1))
    for i, value in enumerate((str(tmp_path / "a.png"), "../a.png", jpeg(1))):
        made = datasets.Dataset.from_dict({"picture": [value, type(value)()], "caption": ["one", "two"]})
        source = sources.open_pairs(
            f"hf:{saved(tmp_path / str(i), made)}", options(image_column="picture", text_columns=("caption",))
        )
        assert source[0]["image"] == jpeg(1) and source[0]["text"] == ["one"]
        with pytest.raises(BadSample, match="no image in the row"):
            source[1]
        assert source.fingerprint()["samples"] == 2
    (tmp_path / "files").mkdir()
    made = datasets.Dataset.from_dict({"image": ["../a.png"], "text": ["one"]})
    made.to_parquet(str(tmp_path / "files" / "train-00000-of-00001.parquet"))
    assert sources.open_pairs(f"hf:{tmp_path / 'files' / 'train'}")[0]["image"] == jpeg(1)


@pytest.mark.parametrize(
    ("drop", "change", "named"),
    [
        ("image", {}, "'image'; its columns are 'text', 'label'"),
        ("", {"image_column": "jpeg"}, "'jpeg'"),
        ("text", {}, "'text'; its columns are 'image', 'label'"),
        ("", {"text_columns": ("text", "alt")}, "'alt'"),
        ("", {"tags_key": "words"}, "'words'"),
    ],
)
def test_columns_that_are_missing(tmp_path, drop, change, named):
    made = rows().remove_columns(drop) if drop else rows()
    with pytest.raises(MissingColumnError, match=f"has no column {named}"):
        sources.open_pairs(f"hf:{saved(tmp_path / 'set', made)}", options(**change))


def test_several_columns_of_images_are_a_choice(tmp_path):
    made = datasets.concatenate_datasets([rows(image="left"), rows(image="right").select_columns("right")], axis=1)
    path = saved(tmp_path / "set", made)
    with pytest.raises(MissingColumnError, match=r"'left', .*'right'"):
        sources.open_pairs(f"hf:{path}")
    assert sources.open_pairs(f"hf:{path}", options(image_column="left"))[0]["image"] == jpeg(0)


def test_classes_are_evaluation_sets(tmp_path):
    datasets.DatasetDict({"train": rows(9), "test": rows(6)}).save_to_disk(str(tmp_path / "set"))
    loaded = registry.load(f"hf:{tmp_path / 'set' / 'test'}", PREPARE)
    assert loaded.labels.tolist() == [0, 1, 2, 0, 1, 2] and list(loaded.names) == NAMES
    assert loaded.images[0].shape == (8, 8, 3) and loaded.card.split_hash
    probe = registry.load(f"probe/hf:{tmp_path / 'set'}", PREPARE)
    assert (len(probe.train), len(probe.validation), len(probe.test)) == (9, 0, 6)
    with pytest.raises(UserError, match="'label'; its columns are 'image', 'text'"):
        registry.load(f"hf:{saved(tmp_path / 'none', rows().remove_columns('label'))}", PREPARE)
    missing = rows().cast_column("label", datasets.Value("int64")).map(lambda row: {"label": -1})
    missing = missing.cast_column("label", datasets.ClassLabel(names=NAMES))
    with pytest.raises(UserError, match="no row has a label in column 'label'"):
        registry.load(f"hf:{saved(tmp_path / 'minus', missing)}", PREPARE)


def test_a_column_of_classes_is_named_in_the_spec(tmp_path):
    def made(n):
        coarse = datasets.Dataset.from_dict(
            {"coarse/label": [i % 2 for i in range(n)]},
            datasets.Features({"coarse/label": datasets.ClassLabel(names=["bird", "beast"])}),
        )
        return datasets.concatenate_datasets([rows(n).rename_column("label", "fine"), coarse], axis=1)

    datasets.DatasetDict({"train": made(9), "test": made(6)}).save_to_disk(str(tmp_path / "set"))
    spec = f"hf:{tmp_path / 'set' / 'test'}"
    loaded = registry.load(f"{spec}?label=coarse%2Flabel", PREPARE)
    assert loaded.labels.tolist() == [0, 1] * 3 and list(loaded.names) == ["bird", "beast"]
    source = sources.open_labelled(f"{spec}?label=fine")
    assert source.labels().tolist() == [0, 1, 2] * 2 and source[1]["image"] == jpeg(1)
    probe = registry.load(f"probe/hf:{tmp_path / 'set'}?label=fine", PREPARE)
    assert (len(probe.train), len(probe.validation), len(probe.test)) == (9, 0, 6)
    with pytest.raises(UserError, match=r"'label'; its columns are .*'fine', 'coarse/label'"):
        registry.load(spec, PREPARE)


def test_columns_of_strings_and_integers_are_classes(tmp_path, capsys):
    """The training split gives the classes of a probe their numbers."""
    for split, colours in {"train": ["red", "Navy Blue", "red", "tan"], "test": ["Navy Blue", "tan", ""]}.items():
        sizes = [10, 9, 9, 10][: len(colours)]
        made = rows(len(colours)).remove_columns("label").add_column("colour", colours).add_column("size", sizes)
        made.to_parquet(str(tmp_path / f"{split}.parquet"))
    zeroshot = registry.load(f"hf:{tmp_path}/test?label=colour", PREPARE)
    assert list(zeroshot.names) == ["Navy Blue", "tan"] and zeroshot.labels.tolist() == [0, 1]
    assert zeroshot.prompts == [["a photo of a Navy Blue"], ["a photo of a tan"]]
    assert "1 of 3 rows have no 'colour' and are left out, row 2 first" in capsys.readouterr().out
    for kind in ("hf", "parquet"):
        probe = registry.load(f"probe/{kind}:{tmp_path}?label=colour", PREPARE)
        assert [part.tolist() for part in probe.tasks[""]] == [[1, 0, 1, 2], [], [0, 2]]
    sizes = registry.load(f"hf:{tmp_path}/test?label=size", PREPARE)
    assert list(sizes.names) == ["9", "10"] and sizes.labels.tolist() == [1, 0, 0]


def test_splits_are_the_files_of_their_name(tmp_path):
    """By itself `datasets` reads test files of sub-folders too, and all files of a folder "test_set" as its test."""
    folder = tmp_path / "test_set"
    (folder / "other").mkdir(parents=True)
    names = ("train", "validation", "test-00000-of-00001", "unseen_types-00000-of-00001", "other/test")
    for n, name in enumerate(names, 3):
        rows(n).to_parquet(str(folder / f"{name}.parquet"))
    sizes = {"train": 3, "validation": 4, "test": 5, "unseen_types": 6, "other/test": 7}
    assert {split: len(sources.open_pairs(f"hf:{folder}/{split}")) for split in sizes} == sizes
    probe = registry.load(f"probe/hf:{folder}", PREPARE)
    assert (len(probe.train), len(probe.validation), len(probe.test)) == (3, 4, 5)
    with pytest.raises(UserError, match='"none"'):
        sources.open_pairs(f"hf:{folder}/none")
    datasets.DatasetDict({"train": rows(3), "mine": rows(2)}).save_to_disk(str(tmp_path / "saved"))
    assert len(sources.open_pairs(f"hf:{tmp_path}/saved/mine")) == 2
    with pytest.raises(UserError, match=r"'none'.* \['train', 'mine'\]"):
        sources.open_pairs(f"hf:{tmp_path}/saved/none")
    with pytest.raises(UserError, match="/nowhere/train: "):
        sources.open_pairs(f"hf:{tmp_path}/nowhere/train")


@pytest.mark.parametrize("layout", ["saved", "parquet"])
def test_a_validation_split_is_used_and_where_it_is_damaged_an_error(tmp_path, layout):
    """Without the error a probe would choose C on training images, and give another number under the same name."""
    parts, folder = {"train": rows(9), "test": rows(6)}, tmp_path / layout
    for sizes, names in (((9, 0, 6), ("train", "test")), ((9, 3, 6), ("train", "validation", "test"))):
        own = {name: parts.get(name, rows(3)) for name in names}
        if layout == "saved":
            datasets.DatasetDict(own).save_to_disk(str(folder))
        else:
            folder.mkdir(exist_ok=True)
            for name, part in own.items():
                part.to_parquet(str(folder / f"{name}-00000-of-00001.parquet"))
        probe = registry.load(f"probe/hf:{folder}", PREPARE)
        assert (len(probe.train), len(probe.validation), len(probe.test)) == sizes
    for file in folder.rglob("*validation*/*.arrow" if layout == "saved" else "validation*"):
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"hf:.*cannot open it"):
        registry.load(f"probe/hf:{folder}", PREPARE)
    if layout == "saved":
        (folder / "dataset_dict.json").write_text("{")
        with pytest.raises(UserError, match=r"hf:.*cannot open it"):
            registry.load(f"probe/hf:{folder}", PREPARE)


@pytest.mark.parametrize("spec", ["hf:lab", "hf:lab/pairs", "hf:", "hf:lab/pairs@v1"])
def test_a_spec_without_a_split(spec):
    with pytest.raises(UserError, match="hf:ORG/NAME"):
        sources.open_pairs(spec)


@pytest.fixture
def hub(server, monkeypatch):
    """The stand-in of the Hub with a set of two configurations, where `datasets` looks for it too."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    template = f"{server.url}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}"
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", template)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # of another server
    configurations = [("small", 5), ("large", 12)]
    files = {}
    for name, n in configurations:
        content = io.BytesIO()
        rows(n).to_parquet(content)
        files[f"{name}/train-00000-of-00001.parquet"] = content.getvalue()
    lines = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*"
        for name, _ in configurations
    ]
    files["README.md"] = "\n".join(["---", "configs:", *lines, "---", ""]).encode()
    server.add("lab/pairs", files)
    server.add("lab/plain", {name.partition("/")[2]: data for name, data in files.items() if "small" in name})
    return server


def test_sets_of_the_hub(hub, monkeypatch):
    source = sources.open_pairs("hf:lab/pairs/small/train")
    assert len(source) == 5 and source[4]["image"] == jpeg(4)
    assert not any("large" in name for name in hub.fetched())
    assert len(sources.open_pairs("hf:lab/plain@main/train")) == 5
    with pytest.raises(UserError, match=r"Config name is missing.*'small', 'large'"):
        sources.open_pairs("hf:lab/pairs/train")
    with pytest.raises(UserError, match=r"Unknown split .test"):
        sources.open_pairs("hf:lab/plain/test")
    for place, named in (("none", "lab/none.* check the name"), ("plain@v2", "Revision 'v2' doesn't exist")):
        with pytest.raises(UserError, match=named):
            sources.open_pairs(f"hf:lab/{place}/train")


def test_a_folder_is_no_set_of_the_hub_and_no_format(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"hf:\./lab/plain/train: "):
        sources.open_pairs("hf:./lab/plain/train")
    assert hub.fetched() == []
    (tmp_path / "parquet").mkdir()
    rows(3).to_parquet(str(tmp_path / "parquet" / "train-00000-of-00001.parquet"))
    assert len(sources.open_pairs("hf:./parquet/train")) == 3


def test_rows_of_the_hub_name_files_of_the_hub_alone(hub, tmp_path):
    private = tmp_path / "private.png"
    private.write_bytes(jpeg(0))
    names = [str(private), "private.png", f"file://{private}"]
    made = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": name} for name in names], "text": names})
    content = io.BytesIO()
    made.to_parquet(content)
    hub.add("lab/paths", {"train-00000-of-00001.parquet": content.getvalue()})
    source = sources.open_pairs("hf:lab/paths/train")
    for index in range(len(names)):
        with pytest.raises(BadSample, match="may not name it"):
            source[index]
    # Saved by the user, the same rows are the user's.
    assert sources.open_pairs(f"hf:{saved(tmp_path / 'mine', made)}")[0]["image"] == jpeg(0)


def test_images_that_are_files_of_a_set_of_the_hub_are_read(hub):
    hub.add("lab/files", {"a.png": jpeg(1), "metadata.csv": b"file_name,text\na.png,one\n"})
    assert sources.open_pairs("hf:lab/files/train")[0]["image"] == jpeg(1)


def test_splits_of_the_hub_are_listed(hub, monkeypatch):
    kind = sources.SOURCES["hf"]

    def has(rest, split):
        return kind.has_split(rest, split, options())

    assert has("lab/pairs/small", "train") and not has("lab/pairs/small?label=label", "validation")
    with pytest.raises(UserError, match="Config name is missing"):
        has("lab/pairs", "validation")
    with pytest.raises(UserError, match="hf:ORG/NAME"):
        has("lab", "validation")
    sources.open_pairs("hf:lab/plain/train")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert has("lab/plain", "train") and not has("lab/plain", "validation") and hub.requests == []


def test_the_cache_is_enough_offline(hub, monkeypatch):
    expected = sources.open_pairs("hf:lab/plain/train").fingerprint()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert sources.open_pairs("hf:lab/plain/train").fingerprint() == expected
    with pytest.raises(UserError, match=r"hf:lab/other/train is not in the cache"):
        sources.open_pairs("hf:lab/other/train")
    assert hub.requests == []


def test_check_reads_it(tmp_path, capsys):
    assert check.main([f"hf:{saved(tmp_path / 'set', rows(32))}"]) == 0
    assert "samples: 32" in capsys.readouterr().out

"""Data sets of the Hub by the package `datasets`: saved ones, and from a stand-in of the Hub's server."""

import io
import pathlib

import numpy as np
import pytest

from configs import pretrain
from tests.data.readers.test_table import record
from tests.helpers import bad_tars
from tests.helpers.bad_tars import jpeg
from tests.helpers.encoding import PREPARE
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import records, sources, tokenizer
from xclip_jax.data.base import SourceOptions
from xclip_jax.data.readers.hub import HubPairs
from xclip_jax.evaluators import registry

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")
NAMES = ["cat", "dog", "hen"]
DOCS = pathlib.Path(__file__).parents[3] / "docs"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")
    datasets.disable_progress_bars()


def rows(n=12, image="image", text="text"):
    columns = {image: [{"bytes": jpeg(i), "path": f"{i}.png"} for i in range(n)]}
    columns[text] = [f"picture {i} " for i in range(n)]
    features = {image: datasets.Image(), text: datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)}
    return datasets.Dataset.from_dict(columns | {"label": [i % 3 for i in range(n)]}, datasets.Features(features))


def saved(path, made=None):
    (made or rows()).save_to_disk(str(path))
    return path


def parquet(made):
    content = io.BytesIO()
    made.to_parquet(content)
    return content.getvalue()


def test_a_folder_of_save_to_disk(tmp_path):
    source = sources.open_pairs(f"hf:{saved(tmp_path / 'set')}")
    assert len(source) == 12 and source[3] == record(jpeg(3), ["picture 3"], "3")
    with pytest.raises(IndexError):
        source[12]
    source = sources.open_pairs(f"hf:{tmp_path / 'set'}", SourceOptions(image_column="label"))
    assert source.fingerprint()["samples"] == 12
    with pytest.raises(BadSample, match="no image in the row"):
        source[0]
    paths = HubPairs("ORG/NAME/train", SourceOptions(), datasets.Dataset.from_dict({"image": ["a\0"], "text": ["a"]}))
    assert isinstance(records.read(paths, 0), BadSample) and paths.describe(0) == {"row": "0"}


def test_the_fingerprint_is_of_the_content(tmp_path):
    prints = [sources.open_pairs(f"hf:{saved(tmp_path / name)}").fingerprint() for name in "ab"]
    assert prints[0] == prints[1] and prints[0]["columns"] == {"image": "image", "text": ["text"]}
    other = rows().map(lambda row, i: {"text": "another"} if i == 7 else {}, with_indices=True)
    assert sources.open_pairs(f"hf:{saved(tmp_path / 'c', other)}").fingerprint() != prints[0]
    # Rows in another order, which `datasets` stores as indices beside the same Arrow file.
    assert sources.open_pairs(f"hf:{saved(tmp_path / 'd', rows().shuffle(seed=0))}").fingerprint() != prints[0]


def test_columns_are_those_of_the_config(tmp_path):
    path = saved(tmp_path / "set", rows(image="jpg", text="txt"))
    source = sources.open_pairs(f"hf:{path}?image=jpg", SourceOptions(text_columns=("txt",)))
    assert source[2]["image"] == jpeg(2) and source[2]["text"] == ["picture 2"]
    fields = [{"alt": f"alt {i}", "words": ["a", "b"]} for i in range(12)]
    made = rows().add_column("json", fields).add_column("tags", ["red, blue,"] * 12)
    keys = SourceOptions(text_columns=("text", "json/alt", "json/words"), tags_key="tags")
    fifth = sources.open_pairs(f"hf:{saved(tmp_path / 'nested', made)}", keys)[5]
    assert fifth["text"] == ["picture 5", "alt 5", "a", "b"] and fifth["tags"] == ["red", "blue"]
    with pytest.raises(UserError, match="has no column 'alt'; its columns are 'image', 'text'"):
        sources.open_pairs(f"hf:{tmp_path / 'nested'}", SourceOptions(text_columns=("text", "alt")))


def test_images_that_are_paths_and_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(jpeg(1))
    for i, value in enumerate((str(tmp_path / "a.png"), "../a.png", jpeg(1))):
        made = datasets.Dataset.from_dict({"image": [value, type(value)()], "text": ["one", "two"]})
        source = sources.open_pairs(f"hf:{saved(tmp_path / str(i), made)}")
        assert source[0]["image"] == jpeg(1) and source[0]["text"] == ["one"]
        with pytest.raises(BadSample, match="no image in the row"):
            source[1]
        assert source.fingerprint()["samples"] == 2


def test_classes_are_evaluation_sets(tmp_path):
    datasets.DatasetDict({"train": rows(9), "test": rows(6)}).save_to_disk(str(tmp_path / "set"))
    loaded = registry.load(f"hf:{tmp_path / 'set' / 'test'}", PREPARE)
    assert loaded.labels.tolist() == [0, 1, 2, 0, 1, 2] and list(loaded.names) == NAMES
    assert loaded.images[0].shape == (8, 8, 3) and loaded.card.split_hash
    probe = registry.load(f"probe/hf:{tmp_path / 'set'}", PREPARE)
    assert (len(probe.train), len(probe.validation), len(probe.test)) == (9, 0, 6)
    with pytest.raises(UserError, match="'label'; its columns are 'image', 'text'"):
        registry.load(f"hf:{saved(tmp_path / 'none', rows().remove_columns('label'))}", PREPARE)
    for place in ("set", "set/none", "nowhere"):
        with pytest.raises(UserError, match=f"^hf:{tmp_path / place}: datasets cannot open it"):
            sources.open_pairs(f"hf:{tmp_path / place}")


def test_a_column_of_classes_is_named_in_the_spec(tmp_path):
    """The training split gives the classes of a probe their numbers."""
    made = {}
    for split, colours in {"train": ["red", "Navy Blue", "red", "tan"], "test": ["Navy Blue", "tan", ""]}.items():
        made[split] = rows(len(colours)).add_column("my/colour", colours)
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "set"))
    zeroshot = registry.load(f"hf:{tmp_path}/set/test?label=my%2Fcolour", PREPARE)
    assert list(zeroshot.names) == ["Navy Blue", "tan"] and zeroshot.labels.tolist() == [0, 1]
    assert zeroshot.prompts == [["a photo of a Navy Blue"], ["a photo of a tan"]]
    probe = registry.load(f"probe/hf:{tmp_path}/set?label=my%2Fcolour", PREPARE)
    assert [part.tolist() for part in probe.tasks[""]] == [[1, 0, 1, 2], [], [0, 2]]


def test_a_validation_split_is_used_and_where_it_is_damaged_an_error(tmp_path):
    """Without the error a probe would choose C on training images, and give another number under the same name."""
    parts = {"train": rows(9), "validation": rows(3), "test": rows(6)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    probe = registry.load(f"probe/hf:{tmp_path / 'set'}", PREPARE)
    assert (len(probe.train), len(probe.validation), len(probe.test)) == (9, 3, 6)
    for file in tmp_path.rglob("validation/*.arrow"):
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"hf:.*cannot open it"):
        registry.load(f"probe/hf:{tmp_path / 'set'}", PREPARE)


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The stand-in of the Hub with a set of two configurations, where `datasets` and its file system look too."""
    server.of_datasets(monkeypatch)
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "indexes"))
    huggingface_hub.HfFileSystem.clear_instance_cache()
    files = {f"{name}/train-00000-of-00001.parquet": parquet(rows(n)) for name, n in (("small", 5), ("large", 12))}
    card = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}/train-*"
    card = "\n".join(["---", "configs:", card.format("small"), card.format("large"), "---", ""]).encode()
    server.add("lab/pairs", files | {"README.md": card})
    server.add("lab/plain", {"train-00000-of-00001.parquet": files["small/train-00000-of-00001.parquet"]})
    yield server
    huggingface_hub.HfFileSystem.clear_instance_cache()


def test_sets_of_the_hub(hub, tmp_path, monkeypatch):
    source = sources.open_pairs("hf:lab/pairs/small/train")
    assert len(source) == 5 and source[4]["image"] == jpeg(4)
    assert not any("large" in name for name in hub.fetched())
    assert len(sources.open_pairs("hf:lab/plain@main/train")) == 5
    for place, named in (
        ("pairs/train", r"Config name is missing.*'small', 'large'"), ("plain/test", "Unknown split .test"),
        ("none/train", "lab/none.* check the name, or log in"), ("plain@v2/train", "'v2' doesn't exist"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"^hf:lab/{place}: .*{named}[^\n]*$"):
            sources.open_pairs(f"hf:lab/{place}")
    monkeypatch.chdir(tmp_path)  # a path is no set of the Hub
    hub.requests.clear()
    with pytest.raises(UserError, match=r"hf:\./lab/plain/train: "):
        sources.open_pairs("hf:./lab/plain/train")
    assert hub.requests == []


def test_rows_of_the_hub_name_files_of_the_hub_alone(hub, tmp_path):
    private = tmp_path / "private.png"
    private.write_bytes(jpeg(0))
    names = [str(private), "private.png", f"file://{private}"]
    made = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": name} for name in names], "text": names})
    hub.add("lab/paths", {"train-00000-of-00001.parquet": parquet(made)})
    source = sources.open_pairs("hf:lab/paths/train")
    for index in range(len(names)):
        with pytest.raises(BadSample, match="may not name it"):
            source[index]
    # Saved by the user, the same rows are the user's.
    assert sources.open_pairs(f"hf:{saved(tmp_path / 'mine', made)}")[0]["image"] == jpeg(0)
    hub.add("lab/files", {"a.png": jpeg(1), "metadata.csv": b"file_name,text\na.png,one\n"})
    assert sources.open_pairs("hf:lab/files/train")[0]["image"] == jpeg(1)


def test_the_cache_is_enough_offline(hub, monkeypatch):
    def has(rest, split):
        return sources.SOURCES["hf"].has_split(rest, split, SourceOptions())

    assert has("lab/pairs/small", "train") and not has("lab/pairs/small?label=label", "validation")
    with pytest.raises(UserError, match="Config name is missing"):
        has("lab/pairs", "validation")
    expected = sources.open_pairs("hf:lab/plain/train").fingerprint()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert sources.open_pairs("hf:lab/plain/train").fingerprint() == expected
    assert has("lab/plain", "train") and not has("lab/plain", "validation")
    with pytest.raises(UserError, match=r"hf:lab/other/train: "):
        sources.open_pairs("hf:lab/other/train")
    for spec in ("hf:lab", "hf:lab/plain", "hf:lab/plain@v1"):
        with pytest.raises(UserError, match="hf:ORG/NAME"):
            sources.open_pairs(spec)
    assert hub.requests == []


# --- published sets, in the layout of their copies


def test_tars_are_read_in_place(hub, monkeypatch, tmp_path):
    """Indexed once, and then one range of bytes per sample."""
    for part, numbers in {"train-0000": range(3), "train-0001": range(3, 7), "validation-0000": [9]}.items():
        samples = [(f"{i:09d}", {"jpg": jpeg(i), "txt": f"picture {i}".encode()}) for i in numbers]
        bad_tars.shard(tmp_path / f"cc12m-{part}.tar", samples)
    hub.add("pixparse/cc12m-wds", {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")})
    source = sources.open_pairs(pretrain.COPIES["cc12m"][1])
    assert len(source) == source.fingerprint()["samples"] == 7
    file, ranges = huggingface_hub.hf_file_system.HfFileSystemFile, []
    fetch = file._fetch_range
    monkeypatch.setattr(file, "_fetch_range", lambda self, *ends: ranges.append(ends) or fetch(self, *ends))
    assert source[5]["image"] == jpeg(5) and source[5]["text"] == ["picture 5"]
    assert sum(end - start for start, end in ranges) <= 2 * (len(jpeg(5)) + 4 * 512)  # two reads


def test_captions_that_are_ids_are_spelt(hub):
    """YFCC15M's copy: `images` with bytes, `texts` with lists of ids, as float32, of one caption or several."""
    captions = [["a fox, at 7 o'clock"], ["a hen", "a white hen in a yard"]]
    ids = [tokenizer.load("clip")(texts, 77).ravel().astype(np.float32) for texts in captions]
    features = datasets.Features({"images": datasets.Image(), "texts": datasets.Sequence(datasets.Value("float32"))})
    images = [{"bytes": jpeg(i), "path": None} for i in range(2)]
    made = datasets.Dataset.from_dict({"images": images, "texts": ids}, features)
    hub.add("Kaichengalex/YFCC15M", {"data/train-00000-of-00001.parquet": parquet(made)})
    config = pretrain.get_config("data=yfcc15m").data
    source = sources.open_pairs(*config.sources, SourceOptions(text_columns=config.text_columns))
    texts = [["a fox , at 7 o ' clock"], captions[1]]
    assert [source[i]["text"] for i in range(2)] == texts and source[1]["image"] == jpeg(1)
    other = datasets.Dataset.from_dict({"images": images, "texts": ids[::-1]}, features)
    options = SourceOptions(image_column="images", text_columns=("texts",))
    assert source.fingerprint() != HubPairs("ORG/NAME/train", options, other).fingerprint()
    assert source.fingerprint() == HubPairs("ORG/NAME/train", options, made).fingerprint()


def test_docs_have_the_copies():
    page = (DOCS / "data.md").read_text().splitlines()
    for name, (pairs, spec) in pretrain.COPIES.items():
        (line,) = [line for line in page if line.startswith(f"| `{name}` |")]
        assert f"{pairs:,}" in line and spec in line

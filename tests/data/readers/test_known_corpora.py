"""Published sets by name, from a stand-in of the Hub with the layout of the copies."""

import io
import pathlib

import numpy as np
import pytest

from tests.helpers import bad_tars
from xclip_jax.core.errors import UserError
from xclip_jax.data import sources, tokenizer
from xclip_jax.data.base import SourceOptions
from xclip_jax.data.readers.known_corpora import CORPORA

huggingface_hub = pytest.importorskip("huggingface_hub")
DOCS = pathlib.Path(__file__).parents[3] / "docs"


def tar(folder, numbers):
    samples = [(f"{i:09d}", {"jpg": bad_tars.jpeg(i), "txt": f"picture {i}".encode()}) for i in numbers]
    return bad_tars.shard(folder / "x.tar", samples).read_bytes()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The stand-in where `datasets` and the file system of the Hub look for it too."""
    datasets = pytest.importorskip("datasets")
    template = f"{server.url}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}"
    settings = {"HF_ENDPOINT": server.url, "HUB_DATASETS_URL": template, "HF_HUB_OFFLINE": False,
                "USE_PARQUET_EXPORT": False, "HF_DATASETS_CACHE": tmp_path / "datasets"}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "indexes"))
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield server
    huggingface_hub.HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize("name", ["cc3m", "cc12m"])
def test_tars_are_read_in_place(hub, name, capsys, monkeypatch, tmp_path):
    """Indexed once, and then one range of bytes per sample."""
    parts = {"train-0000": range(3), "train-0001": range(3, 7), "validation-0000": [9]}
    hub.add(f"pixparse/{name}-wds", {f"{name}-{part}.tar": tar(tmp_path, numbers) for part, numbers in parts.items()})
    source = sources.open_pairs(f"published:{name}")
    assert len(source) == 7
    file, ranges = huggingface_hub.hf_file_system.HfFileSystemFile, []
    fetch = file._fetch_range
    monkeypatch.setattr(file, "_fetch_range", lambda self, *ends: ranges.append(ends) or fetch(self, *ends))
    assert source[5]["image"] == bad_tars.jpeg(5) and source[5]["text"] == ["picture 5"]
    assert sum(end - start for start, end in ranges) <= 2 * (len(bad_tars.jpeg(5)) + 4 * 512)  # two reads
    assert f"published:{name} is tar:hf://datasets/pixparse/{name}-wds/{name}-train-*.tar, " in capsys.readouterr().out
    assert source.fingerprint()["samples"] == 7


def test_captions_that_are_ids_are_spelt(hub):
    """YFCC15M's copy: `images` with bytes, `texts` with lists of ids, as float32, of one caption or several."""
    datasets = pytest.importorskip("datasets")
    captions = [["a fox, at 7 o'clock"], ["a hen", "a white hen in a yard"]]
    ids = [tokenizer.load("clip")(texts, 77).ravel().astype(np.float32) for texts in captions]
    features = datasets.Features({"images": datasets.Image(), "texts": datasets.Sequence(datasets.Value("float32"))})
    images = [{"bytes": bad_tars.jpeg(i), "path": None} for i in range(2)]
    content = io.BytesIO()
    datasets.Dataset.from_dict({"images": images, "texts": ids}, features).to_parquet(content)
    hub.add("Kaichengalex/YFCC15M", {"data/train-00000-of-00001.parquet": content.getvalue()})
    source = sources.open_pairs("published:yfcc15m")
    texts = [["a fox , at 7 o ' clock"], captions[1]]
    assert [source[i]["text"] for i in range(2)] == texts and source[1]["image"] == bad_tars.jpeg(1)
    spelt = tokenizer.load("clip")([text for row in texts for text in row], 77)
    np.testing.assert_array_equal(spelt, np.concatenate(ids).reshape(-1, 77))
    prints = {source.fingerprint()["hash"], sources.open_pairs("published:yfcc15m").fingerprint()["hash"]}
    assert len(prints) == 1


def test_columns_of_the_config_come_first(hub):
    datasets = pytest.importorskip("datasets")
    content = io.BytesIO()
    rows = {"picture": [{"bytes": bad_tars.jpeg(0), "path": None}], "title": ["a fox"]}
    features = datasets.Features({"picture": datasets.Image(), "title": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).to_parquet(content)
    hub.add("Kaichengalex/YFCC15M", {"data/train-00000-of-00001.parquet": content.getvalue()})
    options = SourceOptions(image_column="picture", text_columns=("title",))
    assert sources.open_pairs("published:yfcc15m", options)[0]["text"] == ["a fox"]
    with pytest.raises(UserError, match="has no column 'images'; its columns are 'picture', 'title'"):
        sources.open_pairs("published:yfcc15m")


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("cc3m", "published:cc3m .*data=cc3m,root=FOLDER"),
        ("yfcc15m", "published:yfcc15m .*data=yfcc15m,root=FOLDER"),
        ("datacomp-small", "published:datacomp-small .*data=datacomp-small,root=FOLDER"),
        ("cc4m", "'cc4m'.* 'cc3m'"),
    ],
)
def test_open__names_the_set_and_the_alternative(hub, name, named):
    with pytest.raises(UserError, match=f"^[^\n]*{named}[^\n]*$"):
        sources.open_pairs(f"published:{name}")


@pytest.mark.parametrize("name", CORPORA)
def test_docs_have_each_corpus(name):
    corpus, page = CORPORA[name], (DOCS / "data.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    assert f"{corpus.pairs:,}" in line and (corpus.spec.rpartition(":")[2] or "links") in line

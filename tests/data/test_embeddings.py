"""Files of embeddings: strings of any length, and parts that are joined."""

import numpy as np
import pytest

from xclip_jax.core.errors import UserError
from xclip_jax.data import embeddings

LONG = ["", "a fox", "b" * 10**6, "\u00fc\0" * 3, "\u72d0\nl"]


def test_strings_of_any_length_come_back(tmp_path):
    parts, expected = [], {key: [] for key in embeddings.COLUMNS}
    for i, texts in enumerate((LONG, [], ["last"])):
        parts.append(tmp_path / f"{i}.parquet")
        rows = np.random.default_rng(i).normal(size=(len(texts), 3)).astype(np.float32)
        columns = {"kind": ["text"] * len(texts), "id": [f"f#{i}" for i in range(len(texts))], "text": texts}
        embeddings.write(parts[-1], columns | {"embedding": rows})
        for key, values in expected.items():
            values.extend((columns | {"embedding": rows})[key])
    out = tmp_path / "out.parquet"
    embeddings.join(parts, out, {"rows": 6})
    columns = embeddings.read(out)
    assert embeddings.about(out) == {"rows": 6} and embeddings.about(parts[0]) == {}
    for key in ("kind", "id", "text"):
        assert columns[key] == expected[key]
    np.testing.assert_array_equal(columns["embedding"], expected["embedding"])
    assert columns["embedding"].dtype == np.float32


def test_names_that_are_not_utf8_are_written(tmp_path):
    columns = {"kind": ["image"], "id": ["caf\udce9.png"], "text": [""], "embedding": np.zeros((1, 3))}
    (tmp_path / "id=3").mkdir()  # which pyarrow would take for a column
    embeddings.write(tmp_path / "id=3" / "x.parquet", columns)
    assert embeddings.read(tmp_path / "id=3" / "x.parquet")["id"] == ["caf?.png"]


def test_files_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    embeddings.write(
        tmp_path / "x.parquet", {"kind": ["text"], "id": ["x"], "text": ["x"], "embedding": np.zeros((1, 3))}
    )
    assert embeddings.read("~/x.parquet")["id"] == ["x"]
    assert embeddings.about("~/x.parquet") == {} and embeddings.files("~/x.parquet") == [str(tmp_path / "x.parquet")]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no table")
    for read in (embeddings.read, embeddings.about):
        with pytest.raises(UserError, match=r"x\.parquet is damaged"):
            read(tmp_path / "x.parquet")
        with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
            read(tmp_path / "none.parquet")

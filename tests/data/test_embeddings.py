"""Files of embeddings: strings of any length, parts that are joined, and what a format needs."""

import json
import tracemalloc

import numpy as np
import pytest

from xclip_jax.data import embeddings

LONG = ["", "a fox", "b" * 10**6, "ü\0" * 3, "狐\nl"]


def columns_of(texts, seed=0):
    rows = np.random.default_rng(seed).normal(size=(len(texts), 3)).astype(np.float32)
    return {"kind": ["text"] * len(texts), "id": [f"f#{i}" for i in range(len(texts))], "text": texts,
            "embedding": rows}  # fmt: skip


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_strings_of_any_length_come_back(tmp_path, suffix):
    parts, expected = [], {key: [] for key in embeddings.COLUMNS}
    for i, texts in enumerate((LONG, [], ["last"])):
        parts.append(tmp_path / f"{i}{suffix}")
        columns = columns_of(texts, i)
        embeddings.format_of(parts[-1]).write(parts[-1], columns)
        for key, values in expected.items():
            values.extend(columns[key])
    out = tmp_path / f"out{suffix}"
    embeddings.format_of(out).join(parts, out, {"rows": 6})
    columns, about = embeddings.read(out), embeddings.about(out)
    assert about == {"rows": 6}
    for key in ("kind", "id", "text"):
        assert columns[key] == expected[key]
    np.testing.assert_array_equal(columns["embedding"], expected["embedding"])
    assert columns["embedding"].dtype == np.float32
    if suffix == ".npz":  # as the module's docstring reads it
        with np.load(out) as arrays:
            texts = json.loads(arrays["text"].tobytes())
            assert list(arrays["kind"]) == expected["kind"]
        assert texts == expected["text"]


def test_one_long_caption_costs_its_own_size(tmp_path):
    """1 MB of 1,024 captions: strings of one width would take 4 GB in memory and in the file."""
    texts = ["a caption"] * 1023 + ["x" * 10**6]
    npz, parts = embeddings.Npz(), [tmp_path / "0.npz", tmp_path / "1.npz"]
    tracemalloc.start()
    try:
        for part in parts:
            npz.write(part, columns_of(texts))
        npz.join(parts, tmp_path / "out.npz", {})
        assert npz.read(tmp_path / "out.npz")["text"] == 2 * texts
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6 and (tmp_path / "out.npz").stat().st_size < 2.2e6

"""Files of other projects in this package."""

import hashlib
import importlib.metadata
import pathlib

from xclip_jax import data
from xclip_jax.core import paths


def test_third_party_files_are_those_of_their_wheels():
    """Against the installed packages, whatever their version: these files do not change."""
    names = {path.name for path in (pathlib.Path(data.__file__).parent / "third_party").iterdir()}
    sources = {
        "bpe_simple_vocab_16e6.txt.gz": ("open_clip_torch", "open_clip"),
        "en_classnames.json": ("clip-benchmark", "clip_benchmark/datasets"),
        "en_zeroshot_classification_templates.json": ("clip-benchmark", "clip_benchmark/datasets"),
    }
    assert names == {*sources, "LICENSE.clip", "LICENSE.clip_benchmark", "README.md"}
    for name, (package, folder) in sources.items():
        installed = importlib.metadata.distribution(package).locate_file(f"{folder}/{name}")
        assert paths.third_party(name) == installed.read_bytes(), name


def test_third_party_files_have_not_changed():
    known = {
        "bpe_simple_vocab_16e6.txt.gz": "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        "en_classnames.json": "73d279021a4bc88059884d01fae66c35ec33793ede8bc9ae54c46632625c4993",
        "en_zeroshot_classification_templates.json": "b78cc883ce1d6aefd304f180046ee25e778d627e099222fbcc57f01657c53c31",
    }
    assert {name: hashlib.sha256(paths.third_party(name)).hexdigest() for name in known} == known
    assert b"Copyright (c) 2021 OpenAI" in paths.third_party("LICENSE.clip")
    readme = paths.third_party("README.md").decode()
    assert all(f"`{name}`" in readme for name in [*known, "LICENSE.clip", "LICENSE.clip_benchmark"])

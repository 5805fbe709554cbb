"""Folders, TFDS data sets, specs of sources, and the cards that say which data a run reads."""

import pytest

from xclip_jax.core.errors import UserError
from xclip_jax.data import base, sources


def open_source(spec, data_dir="", **keys):
    return sources.open_pairs(spec, base.SourceOptions(data_dir, **keys))


def test_a_path_without_its_prefix(tmp_path):
    for name, meant in (("pairs", "folder"), ("a.tar", "tar"), ("a.tsv", "csv"), ("a.parquet", "parquet")):
        path = tmp_path / name
        path.mkdir() if meant == "folder" else path.touch()
        assert sources.spec_from_path(str(path)) == f"{meant}:{path}"
        with pytest.raises(UserError, match=rf"^unknown source '{path}'; write tar:PATTERN, "):
            open_source(str(path))
    with pytest.raises(
        UserError, match=r"^unknown source 'what:x'; write tar:PATTERN, .* or package.module:Class:REST\.$"
    ):
        open_source("what:x")


def test_a_path_of_nothing_that_is_read(tmp_path):
    (tmp_path / "sheet.png").touch()
    with pytest.raises(UserError, match=r"^'.*sheet\.png' is a file of no known kind; name its folder or a table\.$"):
        sources.spec_from_path(f"{tmp_path}/sheet.png")
    with pytest.raises(UserError, match=r"^no file or folder 'falt'; check the path, or write KIND:REST, as in hf:"):
        sources.spec_from_path("falt")

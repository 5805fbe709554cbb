"""Folders, TFDS data sets, specs of sources, and the cards that say which data a run reads."""

import re

import pytest

from xclip_jax.core.errors import UserError
from xclip_jax.data import base, sources


def open_source(spec, data_dir="", **keys):
    return sources.open_pairs(spec, base.SourceOptions(data_dir, **keys))


def test_a_path_without_its_prefix(tmp_path):
    for name, meant in (("pairs", "folder"), ("a.tar", "tar"), ("a.tsv", "csv"), ("a.parquet", "parquet")):
        path = tmp_path / name
        path.mkdir() if meant == "folder" else path.touch()
        with pytest.raises(UserError, match=rf"^unknown source '{path}'; .*did you mean '{meant}:{path}'\?$"):
            open_source(str(path))
    with pytest.raises(
        UserError, match=r"^unknown source 'what:x'; write tar:PATTERN, .* or package.module:Class:REST\.$"
    ):
        open_source("what:x")


def test_a_misspelt_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "sheet.png").touch()
    for read in (sources.spec_from_path, sources.parse):
        for path, rest in (
            ("falt", "no file or folder 'falt'; did you mean 'flat'?"),
            ("flat/shet.png", "no file or folder 'flat/shet.png'; did you mean 'flat/sheet.png'?"),
            (f"{tmp_path}/falt", f"no file or folder '{tmp_path}/falt'; did you mean '{tmp_path}/flat'?"),
            (
                "pictures",
                "no file or folder 'pictures'; check the path; a source is written KIND:REST, as in hf:ORG/NAME/train.",
            ),
            ("flat/sheet.png", "'flat/sheet.png' is a file of no known kind; name its folder or a table."),
            ("flat/*.png", "'flat/*.png' is a pattern of images; name the folder, 'flat'."),
        ):
            with pytest.raises(UserError, match=f"^{re.escape(rest)}$"):
                read(path)
    with pytest.raises(UserError, match=r"^unknown source 'foldr:flat'; .*did you mean 'folder:flat'"):
        sources.parse("foldr:flat")

"""Specs of sources, and captions that are no text in any kind of source."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers import bad_tars
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import base, sources


@pytest.mark.parametrize("spec", ["what:x", "pairs", "tfds:", "hf://datasets/x/0.tar", "a.tar", "my_lab:Jsn:x"])
def test_an_unknown_source_is_named(spec):
    with pytest.raises(UserError, match=rf"'{spec}'; write tar:PATTERN, .* or package.module:Class:REST\.$"):
        sources.open_pairs(spec)


def test_a_kind_is_chosen_by_the_end_of_an_address():
    for address in ("s3://x/0.tar", "hf://datasets/x/0.tar"):
        assert not sources.is_spec(address) and sources.spec_from_path(address) == f"tar:{address}"


def test_a_folder_of_images_and_tars_is_ambiguous(tmp_path):
    bad_tars.shard(tmp_path / "a.tar", [("0", {"jpg": bad_tars.jpeg(0), "txt": b"a fox"})])
    assert sources.spec_from_path(str(tmp_path)) == f"tar:{tmp_path}"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "0.JPG").write_bytes(bad_tars.jpeg(0))
    with pytest.raises(UserError, match=rf"has images and tars, such as a\.tar; write folder:{tmp_path} or tar:"):
        sources.spec_from_path(str(tmp_path))
    (tmp_path / "a.tar").unlink()
    assert sources.spec_from_path(str(tmp_path)) == f"folder:{tmp_path}"


def test_a_spec_without_a_split_is_named():
    with pytest.raises(UserError, match="does not name a split"):
        sources.open_pairs("tfds:cifar10")


@pytest.mark.parametrize("kind", ["parquet", "hf", "tar"])
@pytest.mark.parametrize(
    "value, reason",
    [
        (7, r"^caption is not text: 'n' has the type int; "),
        (float("nan"), r"^caption is empty$"),  # a missing value
        (None, r"^caption is empty$"),
    ],
)
def test_a_number_is_not_a_caption_in_any_kind_of_source(tmp_path, kind, value, reason):
    path, image = tmp_path / "pairs", bad_tars.jpeg(0)
    columns = {"image": [{"bytes": image, "path": "0.jpg"}], "n": [value], "text": ["a fox"]}
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif kind == "hf":
        pytest.importorskip("datasets").Dataset.from_dict(columns).save_to_disk(str(path))
    else:
        fields = json.dumps({"n": value, "text": "a fox"}).encode()
        bad_tars.shard(path, [("0", {"jpg": image, "json": fields, "txt": b"a hen"})])
    with pytest.raises(BadSample, match=reason):
        sources.open_pairs(f"{kind}:{path}", base.SourceOptions(text_columns=("n",)))[0]
    both = base.SourceOptions(text_columns=("n", "text"))
    assert len(sources.open_pairs(f"{kind}:{path}", both)[0]["text"]) == 1

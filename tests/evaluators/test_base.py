"""Sequences of items: joined ones name their items, and an undecodable first item is an image."""

import pytest

from tests.evaluators.test_registry import folder, measure
from tests.helpers import tiny
from tests.helpers.encoding import make_encoder
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.evaluators import base, registry


def test_an_unreadable_image_of_pairs_is_named_by_its_file(tmp_path):
    pairs = tiny.folder(tmp_path / "pairs", 40)
    for number in (3, 4, 5):
        (pairs / f"{number:03d}.png").write_bytes(b"no image %d" % number)
    spec = f"retrieval/folder:{pairs}"
    with pytest.raises(UserError, match=rf"3 of 40 images cannot be read, .*image '{pairs}/003\.png'"):
        measure(spec)


def test_any_error_of_a_record_makes_it_an_unreadable_image():
    class Items(list):
        def __getitem__(self, index):
            raise KeyError("pixels")

    with pytest.raises(BadSample, match="KeyError: 'pixels'") as raised:
        base.pictures(Items([0]), None)[0]
    assert raised.value.__notes__ == ["image 'record 0'"]


@pytest.mark.parametrize("kind", ["probe", "finetuned"])
def test_a_set_whose_first_image_is_unreadable_is_opened(kind, tmp_path):
    for part in ("train", "test") if kind == "probe" else ("",):
        (folder(tmp_path / part / "") / "cat" / "00.png").write_bytes(b"<html>")
    spec = f"{kind}/folder:{tmp_path}"
    (evaluator,) = registry.open_all([spec], make_encoder(embed=0, clusters=0))
    assert evaluator.name == f"visual/{spec}"

import pytest

from xclip_jax.data import inspect


@pytest.mark.parametrize("name", [None, "no such font"])
def test_letters_of_a_sheet_keep_their_meaning(name, monkeypatch):
    """Quotes are not question marks, nor are letters that the font lacks."""
    if name:
        monkeypatch.setattr(inspect, "_FONTS", (name,))
    inspect._font.cache_clear()
    shown = inspect._drawable("six o\u2019clock \u201ccafe\u0301\u201d \u65e5")
    assert shown in ("six o\u2019clock \u201ccafe\u201d \u65e5", "six o\u2019clock \u201ccaf\u00e9\u201d \u65e5")
    box = bytes(inspect._font()[0].getmask("\uffff"))
    assert all(bytes(inspect._font()[0].getmask(letter)) != box for letter in shown[:-1])
    inspect._font.cache_clear()

"""Names in the picture, which are printable and fit. tests/demo draws whole ones."""

from xclip_jax.report import picture


def test_names_are_printable_and_fit():
    assert picture.printable("Côte d’Ivoire – 中") == "Cote d’Ivoire - ?"
    assert picture.fit("short", 14, 200) == "short"
    assert picture.fit("a very long name", 14, 60).endswith("…")
    assert picture.fit("long", 14, 0) == "…"

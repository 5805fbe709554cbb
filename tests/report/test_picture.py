"""The picture: its order, and names that fit. tests/demo draws whole ones."""

import numpy as np

from xclip_jax.report import examples, picture


def test_the_set_with_the_best_ranks_comes_first():
    def named(title, num_classes, *ranks):
        guesses = [examples.Prediction(np.zeros((4, 4, 3), np.uint8), "a", rank, []) for rank in ranks]
        return examples.ZeroShotExamples(title, "", num_classes, guesses)

    sets = [named("unseen", 10, 1, 5), named("line", 1000, 900), named("known", 1000, 20, 30, 10)]
    assert [shown.title for shown in picture.best_first(sets)] == ["known", "unseen", "line"]


def test_names_are_printable_and_fit():
    assert picture.printable("Côte d’Ivoire – 中") == "Cote d’Ivoire - ?"
    assert picture.fit("short", 14, 200) == "short"
    assert picture.fit("a very long name", 14, 60).endswith("…")
    assert picture.fit("long", 14, 0) == "…"

"""Captions of `benchmarks.step`."""

from benchmarks import step


def test_lengths_have_the_published_moments():
    drawn = step.caption_lengths(200_000) - 2
    assert 19 < drawn.mean() < 20.2  # cut at 77
    assert drawn.min() >= 1 and drawn.max() == step.CONTEXT["natural"] - 2
    tokens = step.random_tokens(step.caption_lengths(8), step.CONTEXT["natural"], 100)
    assert (tokens.argmax(axis=1) + 1 == step.caption_lengths(8)).all()

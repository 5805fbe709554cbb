"""Captions and the account of `benchmarks.step`."""

import pytest

from benchmarks import step

IMAGE = "jit(step)/jvp(TwoTowers.encode_image)/img/transformer/block_3"
TEXT = "jit(step)/transpose(jvp(TwoTowers.encode_text))/txt/transformer/block_0"


@pytest.mark.parametrize(
    ("source", "row", "column"),
    [
        (f"{IMAGE}/mlp/up/dot_general", "matrix products of the MLPs", "image, forward"),
        (f"{TEXT}/mlp/up/reduce_sum", "GELU, biases and residuals of the MLPs", "text, backward"),
        (f"{TEXT}/attention/qkv/dot_general", "matrix products of q, k, v and output", "text, backward"),
        (f"{IMAGE}/attention/bhnd,bhmd->bhnm/dot_general", "scores, softmax and values of attention", "image, forward"),
        (f"{TEXT}/attention/qkv/transpose", "biases and copies of q, k, v", "text, backward"),
        (f"{IMAGE}/norm_1/norm/mul", "LayerNorm", "image, forward"),
        (f"{IMAGE}/add", "residuals", "image, forward"),
        (
            "jit(step)/jvp(TwoTowers.encode_image)/img/patches/dot_general",
            "patches, vocabulary, pooling, projections",
            "image, forward",
        ),
        ("jit(step)/cond/branch_1_fun/add", step.OTHER, "neither"),
        ("", step.OTHER, "neither"),
    ],
)
def test_rows_and_columns(source, row, column):
    assert step.row_of(source) == (row, column)


def test_an_instant_is_shared_by_what_runs_then():
    spans = [(0.0, 10.0, "a"), (4.0, 8.0, "b"), (6.0, 8.0, "b"), (20.0, 21.0, "a"), (30.0, 30.0, "c")]
    # 0-4 a; 4-6 half each; 6-8 a third and two thirds; 8-10 a; 20-21 a.
    assert step.shares(spans) == pytest.approx({"a": 4 + 1 + 2 / 3 + 2 + 1, "b": 1 + 4 / 3})


def test_the_table_sums_to_the_wall_time():
    cells = {("LayerNorm", "image, forward"): 1.0, ("residuals", "text, backward"): 30.0}
    lines = step.table(cells, 40.0).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| residuals | ") and lines[2].endswith(" 30 |")
    assert lines[-2].endswith("| 9 |") and lines[-1].endswith("| 40 |")


def test_lengths_have_the_published_moments():
    drawn = step.caption_lengths(200_000) - 2
    assert 19 < drawn.mean() < 20.2  # cut at 77
    assert drawn.min() >= 1 and drawn.max() == step.CONTEXT["natural"] - 2
    tokens = step.random_tokens(step.caption_lengths(8), step.CONTEXT["natural"], 100)
    assert (tokens.argmax(axis=1) + 1 == step.caption_lengths(8)).all()

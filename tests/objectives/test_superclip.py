import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import superclip as tokens
from tests.helpers import tiny
from tests.helpers.util import assert_close, central_differences, rows_over
from xclip_jax.config import load, schema
from xclip_jax.objectives import make_objective
from xclip_jax.parallel.mesh import replicated
from xclip_jax.train.cost.hlo import collectives

START, END, VOCAB = 1, 2, 19


def captions(b=8, n=9, seed=0, pad=0):
    """Random rows: start, tokens of which some repeat, end, padding; the first is cut and the second one empty."""
    rng = np.random.default_rng(seed)
    text = np.full((b, n), pad, np.int32)
    for row, length in zip(text, [n - 2, 0, *rng.integers(1, n - 2, b - 2)], strict=True):
        row[: length + 2] = [START, *rng.integers(3, VOCAB, length), END]
    return text


def ends(text):
    return jnp.asarray([list(row).index(END) for row in text])


def words(row):
    """Tokens of a caption, with its start and without its end and padding."""
    return {int(x) for x in row[: list(row).index(END)]}


def oracle(batches, logits):
    """Loss of the last of `batches`, lists of the classes of each caption, and its targets, in float64."""
    seen = [caption for batch in batches for caption in batch]
    documents = np.array([sum(c in caption for caption in seen) for c in range(logits.shape[1])])
    idf = np.log((len(seen) + 1) / (documents + 1))
    weights = np.array([[idf[c] * (c in caption) for c in range(len(idf))] for caption in batches[-1]])
    totals = weights.sum(axis=1, keepdims=True)
    target = np.divide(weights, totals, out=np.zeros_like(weights), where=totals > 0)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -(target * log_p).sum(axis=1).mean(), target, documents / len(seen)


def given(batches):
    state = tokens.initial_state(VOCAB)
    for text in batches:
        _, (_, state) = loss(jnp.zeros((len(text), VOCAB)), jnp.asarray(text), ends(text), state)
    return state


def loss(logits, text, end, state, classes=0):
    term = tokens.Tokens(outputs=classes)
    value, metrics, state = term({"tokens": logits}, None, state, {"text": text, "text_end": end})
    return value, (metrics, state)


@pytest.mark.parametrize(("steps", "devices", "pad"), [(1, 1, END), (3, 8, 0), (3, 1, 5)])
def test_equals_oracle(steps, devices, pad):
    """Starts, ends and padding have no weight, and a token that pads has one where a caption has it."""
    batches = [captions(seed=i, pad=pad) for i in range(steps)]
    logits = np.random.default_rng(7).normal(size=(8, VOCAB))
    arrays = [jnp.asarray(logits, jnp.float32), jnp.asarray(batches[-1]), ends(batches[-1])]
    arrays = jax.device_put(arrays, rows_over(devices))
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (metrics, state)), grad = step(*arrays, given(batches[:-1]))
    captioned = [list(map(words, text)) for text in batches]
    expected, target, frequency = oracle(captioned, logits)
    assert float(value) == pytest.approx(expected, rel=1e-5) and float(metrics["loss"]) == float(value)
    assert_close([grad], central_differences(lambda x: oracle(captioned, x)[0], [logits]), 2e-5)
    hits = [target[i, row.argmax()] > 0 for i, row in enumerate(logits)]
    assert float(metrics["top1"]) == pytest.approx(np.mean(hits)) and 0 < np.mean(hits) < 1
    np.testing.assert_allclose(np.asarray(state["token_frequency"])[3:], frequency[3:], rtol=1e-5)
    assert float(state["token_batches"]) == steps


@pytest.mark.parametrize("devices", [1, 8])
def test_only_the_first_tokens_have_classes(devices):
    """In a head of 9 classes, with numbers in order of appearance; the others are not there."""
    batches, class_of = [captions(n=5, seed=i) for i in range(3)], {}
    state = tokens.Tokens(outputs=9).initial_state(None, VOCAB)
    logits = np.random.default_rng(7).normal(size=(8, 9))
    step = jax.jit(jax.value_and_grad(functools.partial(loss, classes=9), has_aux=True))
    for text in batches:
        new = sorted({x for row in text for x in words(row)} - class_of.keys())
        class_of |= dict(zip(new, range(len(class_of) + 1, 9)))  # noqa: B905 some get no class
        arrays = [jnp.asarray(logits, jnp.float32), jnp.asarray(text), ends(text)]
        (value, (_, state)), grad = step(*jax.device_put(arrays, rows_over(devices)), state)
    assert state["token_classes"].tolist() == [class_of.get(x, 0) for x in range(VOCAB)] and len(class_of) == 8
    captioned = [[{class_of[x] for x in words(row) & class_of.keys()} for row in text] for text in batches]
    expected, _, frequency = oracle(captioned, logits)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert_close([grad], central_differences(lambda x: oracle(captioned, x)[0], [logits]), 2e-5)
    np.testing.assert_allclose(state["token_frequency"], frequency, rtol=1e-5)


def test_the_recipe_adds_the_term(tmp_path):
    arg = f"pairs={tiny.folder(tmp_path, n=32)},size=48,steps=4,batch=8,tokenizer=bytes"
    config = schema.resolve(load.load_config(f"{tokens.__file__}:{arg}"))
    assert config.objective.terms == {"clip": 1.0, "tokens": 1.0} and config.model.img.image_size == 48
    assert config.objective.term("tokens") == tokens.Tokens(outputs=tokens.SMALL_HEAD)
    assert make_objective(config.objective).classes == 0  # trains on pairs, not on labels
    large = schema.resolve(load.load_config(f"{tokens.__file__}:{arg},objective=siglip,preset=S/16"))
    assert large.objective.terms == {"siglip": 1.0, "tokens": 1.0} and large.objective.term("tokens").outputs == 0


@pytest.mark.parametrize("classes", [0, 512])
def test_rows_stay_on_their_device(classes):
    """What travels grows with the vocabulary and not with the batch; 8 devices, gradients included."""
    b, n, vocab = 64, 12, 512
    rows = rows_over(8)
    whole = replicated(rows.mesh)
    logits = jax.ShapeDtypeStruct((b, vocab), jnp.float32, sharding=rows)
    text, end = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in ((b, n), (b,)))
    state = tokens.Tokens(outputs=classes).initial_state(None, vocab)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state)
    of_classes = functools.partial(loss, classes=classes)
    step = jax.jit(jax.value_and_grad(of_classes, has_aux=True), out_shardings=((whole, (whole, whole)), rows))
    compiled = step.lower(logits, text, end, state).compile()
    found = collectives(compiled.as_text(), 8)
    assert {x.kind for x in found} == {"all-reduce"} and sum(x.total for x in found) < 4 * (vocab + 64) + classes
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * b // 8 * vocab

"""The choice of texts and images: against loops, ties, chance, unreadable images."""

import itertools

import numpy as np
import pytest

from tests.evaluators.test_registry import broken
from tests.helpers.encoding import by_name, make_encoder, noise, small_model
from xclip_jax.core.errors import UserError
from xclip_jax.evaluators import choice, registry
from xclip_jax.evaluators.choice import Choice, ChoiceSet

N = 24


def words(n, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(n)]


def single(texts=3, **changes):
    some = words(N * texts)
    return ChoiceSet(
        "set", noise(N), np.arange(N)[:, None], [some[i * texts : (i + 1) * texts] for i in range(N)], **changes
    )


def paired():
    some = words(2 * N, seed=1)
    return ChoiceSet("set", noise(2 * N, seed=1), np.arange(2 * N).reshape(N, 2), list(zip(some[::2], some[1::2])))  # noqa: B905


def measured(data, embed=8, clusters=10):
    return Choice(make_encoder(embed, clusters), data).measure(small_model(embed, clusters)[1])


def cosines(data):
    """(images, texts) of each item, by the embeddings of single images and texts."""
    encoder, variables = make_encoder(), small_model()[1]
    img = encoder.images(variables, data.images)["embedding"]
    return [
        np.array([[z @ encoder.texts(variables, [text])["embedding"][0] for text in texts] for z in img[pictures]])
        for pictures, texts in zip(data.pictures, data.texts, strict=True)
    ]


def test_one_image_and_several_texts():
    data = single(3)
    metrics, items = by_name(measured(data))
    right = [max(range(3), key=list(scores[0]).__getitem__) == 0 for scores in cosines(data)]
    assert items["choice/set/accuracy"].values.tolist() == right and 0 < sum(right) < N
    assert metrics["choice/set/accuracy"] == pytest.approx(100 * np.mean(right))
    assert metrics["choice/set/n"] == N and metrics["choice/set/ways"] == 3


def test_two_images_and_two_texts():
    """Winoground's scores: each image has the nearer text, each text the nearer image, or both."""
    data = paired()
    _, items = by_name(measured(data))
    s = np.array(cosines(data))  # (items, images, texts)
    text = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    image = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    expected = {"text": text, "image": image, "group": text & image}
    assert 0 < sum(text & image) <= min(sum(text), sum(image)) < N and (text != image).any()
    for score, values in expected.items():
        assert items[f"choice/set/{score}_score"].values.tolist() == values.tolist()


def test_the_chance_is_that_of_all_orders():
    """Independent scores: every order of the four is equally likely."""
    orders = [np.reshape(order, (2, 2)) for order in itertools.permutations(range(4))]
    for metric, right in choice._right(orders).items():
        assert 100 * right.mean() == pytest.approx(choice.PAIRED[metric])
    for data, chances in ((paired(), choice.PAIRED), (single(4), {"accuracy": 25})):
        assert {r.metric: r.chance for r in measured(data) if r.chance is not None} == chances


def test_equal_scores_are_wrong():
    data = ChoiceSet("set", noise(2), np.array([[0], [1]]), [["abc", "abc"], ["abcde", "abcde", "x"]])
    assert by_name(measured(data))[0]["choice/set/accuracy"] == 0
    assert not any(right.any() for right in choice._right([np.ones((2, 2))]).values())
    assert choice._right([np.array([[np.nan, 0.1]]), np.array([[-np.inf, -np.inf]])])["accuracy"].tolist() == [0, 0]


def test_a_right_text_among_the_wrong_ones_is_wrong():
    """Rows of one matrix product may differ in their last bits though their texts are equal."""
    texts = words(200)
    items = [[right, other, right] for right, other in zip(texts[::2], texts[1::2], strict=True)]
    metrics = by_name(measured(ChoiceSet("set", noise(100), np.arange(100)[:, None], items), embed=512))[0]
    assert [x for name, x in metrics.items() if name.endswith("accuracy")] == [0, 0, 0, 0]


def test_all_scores_of_a_model_with_two_similarities():
    """ "both" is the sum of the two logits, each over its deviation among the pairs that items have."""
    data = single(2)
    encoder, variables = make_encoder(), small_model()[1]
    first, second = encoder.similarities
    img = encoder.images(variables, data.images)
    logits = []
    for similarity in (first, second):
        rows = [similarity.rows(encoder.texts(variables, texts)[similarity.feature]) for texts in data.texts]
        features = img[similarity.feature]
        logits.append([similarity.scores(features[i : i + 1], y)[similarity.logits][0] for i, y in enumerate(rows)])
    total = sum(np.array(x) / np.std(x) for x in logits)
    _, items = by_name(measured(data))
    assert items["choice/set/both/accuracy"].values.tolist() == (total[:, 0] > total[:, 1]).tolist()
    clusters = np.array(logits[1])
    assert items["choice/set/cross_entropy/accuracy"].values.tolist() == (clusters[:, 0] > clusters[:, 1]).tolist()
    assert "choice/set/clusters/accuracy" not in items and "choice/set/cosine/accuracy" in items
    names = {name.rpartition("/")[0] for name in by_name(measured(data, clusters=0))[1]}
    assert names == {"choice/set"}


def test_the_mean_over_parts():
    groups = {"few": np.arange(N) < 4, "many": (np.arange(N) >= 4) & (np.arange(N) < 20)}  # the last are in no part
    results = {r.key: r for r in measured(single(2, groups=groups)) if not r.score}
    values = results["accuracy"].items.values
    expected = {"few": 100 * values[:4].mean(), "many": 100 * values[4:20].mean()}
    assert {key: results[f"{key}/accuracy"].value for key in groups} == pytest.approx(expected)
    assert results["macro_accuracy"].value == pytest.approx(np.mean(list(expected.values())))
    assert results["accuracy"].value == pytest.approx(100 * values.mean())
    assert results["macro_accuracy"].items.value() == pytest.approx(results["macro_accuracy"].value)
    assert results["few/accuracy"].n == 4 and results["macro_accuracy"].chance == 50


def test_a_part_with_the_name_of_a_score_is_refused():
    """Both would be "both/accuracy" in the files of results."""
    data = single(2, groups={"both": np.arange(N) < 4})
    with pytest.raises(UserError, match=r"^set: the part 'both' has the name of a score"):
        measured(data)
    assert "choice/set/both/accuracy" in by_name(measured(data, clusters=0))[0]


def test_items_of_one_image_are_resampled_together():
    data = ChoiceSet("set", noise(3), np.array([[0], [0], [1], [2]]), [words(2, i) for i in range(4)])
    assert data.together.tolist() == [0, 0, 1, 2] and single().together is None
    assert by_name(measured(data))[1]["choice/set/accuracy"].groups.tolist() == [0, 0, 1, 2]
    # The third item shares one image with the first, and one with the second.
    pairs = [[0, 1], [2, 3], [1, 3], [4, 4]]
    data = ChoiceSet("set", noise(5), np.array(pairs), [words(2, i) for i in range(4)])
    assert data.together.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("make", [single, paired])
def test_an_unreadable_image_is_wrong_and_changes_no_other_item(make):
    whole = make()
    data = ChoiceSet("set", broken(whole.images, 1), whole.pictures, whole.texts)
    metrics, after = by_name(registry.measure(Choice(make_encoder(), data), small_model()[1]))
    before = by_name(measured(whole))[1]
    item = 1 if make is single else 0
    assert before.keys() == after.keys() and metrics["choice/set/unreadable"] == 1
    for key, items in after.items():
        assert items.values[item] == 0
        if "/both/" not in key:
            assert (np.delete(items.values, item) == np.delete(before[key].values, item)).all()


@pytest.mark.parametrize(
    ("pictures", "texts"),
    [([[0]], [["a"]]), ([[0, 1]], [["a", "b", "c"]]), ([[0, 1, 2]], [["a", "b"]]), (np.zeros((0, 1)), [])],
)
def test_wrong_items_are_refused(pictures, texts):
    with pytest.raises(UserError, match=r"^set: "):
        ChoiceSet("set", noise(3), np.array(pictures), texts)

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import xclip_jax
from tests.helpers import tiny
from tests.helpers.util import assert_close
from xclip_jax import interop
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.interop import tensor_files
from xclip_jax.train import build, state
from xclip_jax.train.learner import Learner

SIZES = {
    "steps": 10, "batch": 16, "image_size": 16, "patch": 8, "context_length": 12, "embed": 16, "clusters": 24,
    "hidden": 32, "dtype": "float32", "tokenizer": "bytes",
    **{f"model.{tower}.{name}": value for tower in ("img", "txt")
       for name, value in {"width": 32, "depth": 1, "heads": 2}.items()}, "model.scan": False,
}  # fmt: skip


def batch(learner):
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    return {"image": images, "text": learner.tokenize([f"picture {i}" for i in range(16)])}


def leaves(tree):
    return jax.tree.leaves(jax.device_get(tree))


@pytest.fixture(scope="module")
def learner():
    return xclip_jax.create("Ti/12", **SIZES)


def test_a_step_takes_the_negatives_of_the_config():
    learner = xclip_jax.create("Ti/12", **SIZES, objective="clip", negatives=2, negative_columns=("wrong",))
    with pytest.raises(UserError, match=r"takes .*'negatives': 'int32 \(16, 2, 12\)'"):
        learner.step(None, batch(learner))


def test_create__equals_build():
    config = tiny.config("nclip", steps=10)
    experiment = build.build(config)
    learner = Learner(experiment)
    expected = state.create(experiment.init, experiment.abstract)
    initial = learner.init()
    assert all(map(np.array_equal, leaves(initial), leaves(expected)))
    stepped = learner.step(initial, batch(learner))
    assert all(map(np.array_equal, leaves(stepped), leaves(experiment.compiled(expected, batch(learner)))))


def test_create__seed(learner):
    first, second = (learner.init(seed=seed) for seed in (1, 2))
    assert int(first.seed) == 1
    assert not np.array_equal(first.params["txt"]["tokens"], second.params["txt"]["tokens"])


def test_step__has_the_loss_of_another_mesh(learner):
    sharded = xclip_jax.create("Ti/12", strategy="fsdp", **{"mesh.data": 2, "mesh.fsdp": 4}, **SIZES)
    losses = [float(x.step(x.init(), batch(x))[1]["loss"]) for x in (learner, sharded)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_optimizer__replaces_the_recipes():
    """Frozen parameters stay, and others move by optax's own update."""
    sizes = {"objective": "clip", "freeze": ("img",), **SIZES}
    learner = xclip_jax.create("Ti/12", optimizer=optax.sgd(1.0), **sizes)
    before = learner.init()
    params = jax.device_get(before.params)
    after, metrics = learner.step(before, batch(learner))
    assert all(map(np.array_equal, leaves(params["img"]), leaves(after.params["img"])))
    moved = jax.tree.map(jnp.subtract, params, jax.device_get(after.params))
    assert_close([optax.tree.norm(moved)], [metrics["grad_norm"]], 1e-4)
    with pytest.raises(UserError, match=r"optim\.lr is an option of the optimizer"):
        xclip_jax.create("Ti/12", optimizer=optax.sgd(1.0), lr=1.0, **sizes)


def test_optimizer__keeps_its_counters():
    """A schedule inside `optax.MultiSteps` counts updates, not steps."""
    inner = optax.MultiSteps(optax.sgd(lambda count: 0.1 * count), 2)
    device = {"devices": jax.devices()[:1], "objective": "clip"}
    learner = xclip_jax.create("Ti/12", optimizer=inner.gradient_transformation(), **device, **SIZES)
    state = learner.init()
    for _ in range(4):
        state, _ = learner.step(state, batch(learner))
    counts = [
        int(x)
        for path, x in jax.tree.leaves_with_path(state.opt_state)
        if jax.tree_util.keystr(path).endswith(".count")
    ]
    assert counts == [2] and int(state.step) == 4


def test_save__load_and_a_new_run_have_the_same_model(learner, tmp_path, monkeypatch):
    trained, _ = learner.step(learner.init(), batch(learner))
    learner.save(tmp_path / "saved", trained)
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files.safetensors.numpy, "save", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.save(tmp_path / "saved", learner.init())
    _, variables = interop.read(str(tmp_path / "saved"))
    assert all(map(np.array_equal, leaves(variables["params"]), leaves(trained.params)))
    model = xclip_jax.load(tmp_path / "saved")
    pixels = batch(learner)
    expected = learner.experiment.model.apply(
        trained.variables(), learner.experiment.batch_noise.apply({"image": pixels["image"]}), pixels["text"]
    )
    assert_close([model.encode_image(pixels["image"])], [expected["z_img"]], 1e-4)
    assert model.has_clusters
    again = xclip_jax.create("Ti/12", **{"init.weights": str(tmp_path / "saved")}, **SIZES).init()
    assert all(map(np.array_equal, leaves(again.params), leaves(trained.params)))
    assert int(again.step) == 0


def test_save__leaves_files_of_other_programs(learner, tmp_path):
    initial = learner.init()
    learner.save(tmp_path / "old", initial)
    learner.save(tmp_path / "old", initial)
    for name in ("config.json", "tokenizer.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text('{"theirs": 1}')
        with pytest.raises(UserError, match=f"has other files, such as '{name}'; name a new folder"):
            learner.save(folder, initial)
        assert [(file.name, file.read_text()) for file in folder.iterdir()] == [(name, '{"theirs": 1}')]
    theirs = tmp_path / "old" / "config.json"  # no file of a saved model
    theirs.write_text('{"theirs": 1}')
    learner.save(tmp_path / "old", initial)
    assert theirs.read_text() == '{"theirs": 1}'


def test_images(learner, pairs):
    paths = [str(path) for path in sorted(pairs.rglob("*.png"))[:2]]
    views = learner.preprocess(paths)
    assert views.shape == (2, 16, 16, 3) and views.dtype == np.uint8
    assert np.array_equal(views, learner.preprocess([pathlib.Path(path).read_bytes() for path in paths]))
    crops = [learner.transform(paths, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(crops[0], crops[1]) and not np.array_equal(crops[0], crops[2])
    assert learner.preprocess([]).shape == (0, 16, 16, 3)
    with pytest.raises(BadSample):
        learner.preprocess([b"no image"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"btach": 8}, "'btach' .* did you mean 'batch'"),
        ({"depth": 3}, r"'depth' .* did you mean 'model\.img\.depth' or 'model\.txt\.depth'"),
    ],
)
def test_create__wrong_keys(keys, message):
    with pytest.raises(UserError, match=message):
        xclip_jax.create("Ti/12", steps=1, **keys)


@pytest.mark.parametrize("change", [{"text": None}, {"image": np.zeros((16, 16, 16, 3), np.float32)}])
def test_step__wrong_batch(learner, change):
    given = {name: x for name, x in (batch(learner) | change).items() if x is not None}
    with pytest.raises(UserError, match="a step takes"):
        learner.step(None, given)

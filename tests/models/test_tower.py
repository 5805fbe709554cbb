"""An image tower of another package, `tests/extension/conv_mixer.py`, in a run: from its config to its report."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

import xclip_jax
from tests.extension.conv_mixer import ConvMixer
from tests.helpers import tiny
from xclip_jax import report
from xclip_jax.commands import evaluate, export, plan
from xclip_jax.config import schema
from xclip_jax.config.load import load_config
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.models.tower import ImageTower
from xclip_jax.train import build, cost, trainer, weights
from xclip_jax.train.cost import roofline as topology

pytestmark = pytest.mark.long

TYPE = "tests.extension.conv_mixer:ConvMixer"
OPTIONS = {"type": TYPE, "image_size": 24, "patch": 4, "width": 20, "depth": 2, "drop_path": 0.5}


def config(run="runs/tiny", **changes):
    return tiny.config(run=run, model__plugins={"img": OPTIONS}, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    # Classes of unequal sizes: a model that takes all images for one of them says which by its accuracy.
    for n, label in enumerate(("ant", "bee", "cat", "dog", "emu", "fox"), 1):
        for text in tiny.folder(root / "set" / label, n, seed=n).glob("*.txt"):
            text.unlink()
    return {"data__sources": (f"folder:{tiny.folder(root / 'pairs')}",), "eval__sets_at_end": (f"folder:{root}/set",)}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    c = config(tmp_path_factory.mktemp("runs") / "run", steps=6, checkpoint__every=3, eval__report=True, **data)
    results = trainer.run(c, [report.callback()])
    assert any(key.endswith("top1") for key in results)
    return c


def test_the_config_alone_finds_the_tower_again(run):
    saved = RunReader(run.run).read_config()["config"]
    assert saved["model"]["plugins"]["img"] == OPTIONS
    tower = schema.resolve(schema.complete(json.loads(json.dumps(saved)))).model.tower("img")
    assert (type(tower).__name__, tower.image_size, tower.width) == ("ConvMixer", 24, 20)
    model = xclip_jax.load(run.run)
    assert model.size == 24
    images = [np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8) for i in range(3)]
    assert model.encode_image(images).shape == (3, 16)


def test_it_is_evaluated_as_the_run_was_and_has_a_report(run):
    folder = RunReader(run.run)
    suite = run.eval.sets_at_end[0]
    result, results = evaluate.evaluate(run.run, suite)["results"][0], folder.read_results()["results"]
    of_run = {key: results[f"{result['name']}/{key}"] for key in result["metrics"]}
    assert of_run == result["metrics"] and of_run["top1"] == result["value"]
    page = (folder.path / "report.html").read_text()
    assert "ConvMixer of width 20" in page


def test_flops_and_plan_count_it():
    one, other = (schema.resolve(c) for c in (config(), config(model__img__depth=3)))
    assert cost.forward_flops(one) == cost.forward_flops(other)  # group model.img is not used
    assert cost.forward_flops(one)["img"] == 2.0 * 36 * (48 * 20 + 2 * (25 * 20 + 400))
    assert cost.forward_flops(one)["txt"] == cost.forward_flops(schema.resolve(tiny.config()))["txt"]
    made = build.build(one)
    params = made.abstract.params["img"]
    assert params["Conv_0"]["kernel"].shape == (4, 4, 3, 20) and len(jax.tree.leaves(params)) == 14
    remedies = " ".join(cost.remedies(made))
    assert "model.txt.remat" in remedies and "img" not in remedies


@dataclasses.dataclass(frozen=True)
class Uncounted(ConvMixer):
    def flops(self, train):
        return ImageTower.flops(self, train)


def test_a_tower_need_not_count_its_flops(monkeypatch):
    c = tiny.config(model__plugins={"img": OPTIONS | {"type": f"{__name__}:Uncounted"}})
    made = build.build(c)
    assert cost.forward_flops(made.config) is None and cost.step_flops(made.config) is None
    monkeypatch.setattr(plan, "devices_of", lambda *_: (jax.devices(), topology.CHIPS["v5e"]))
    monkeypatch.setattr(cost, "compile_config", lambda *_: (made, None, "too large"))
    facts = plan.plan(c, "v5e:2x4")
    assert "pairs_per_second" not in facts
    assert "DOES NOT FIT" in plan.render(facts)


def test_a_new_run_starts_from_its_weights(run, data, tmp_path, capsys):
    p = build.build(config(tmp_path / "run", init__weights=run.run, **data))
    tensors, _ = weights.read_initial(p.config, p.abstract)
    assert "initialised at random" not in capsys.readouterr().out
    trained = tiny.restored(run)[0].params["img"]["Conv_0"]["kernel"]
    np.testing.assert_array_equal(tensors["params/img/Conv_0/kernel"], trained)
    p = build.build(tiny.config(init__weights=run.run, model__img__width=20))
    tensors, _ = weights.read_initial(p.config, p.abstract)
    assert "params/txt/tokens" in tensors and not [name for name in tensors if name.startswith("params/img")]
    assert "img is another tower: ConvMixer of width 20 in" in capsys.readouterr().out


def test_fine_tuning_takes_it_over(run):
    c = load_config(f"finetune:data=tfds:imagenet2012,weights={run.run}")
    assert c.model.plugins.img.to_dict() == OPTIONS
    with pytest.raises(UserError, match=r"optim\.layer_decay is 0\.65, and ConvMixer has no layers .*; set it to 1"):
        schema.resolve(c)
    c.optim.layer_decay = 1.0
    assert set(build.build(c).abstract.params) == {"img", "classifier"}


def test_our_own_form_holds_it_and_others_refuse_it(run, tmp_path):
    export.export(run.run, str(tmp_path / "own"), to="safetensors")
    card = (tmp_path / "own" / "README.md").read_text()
    assert "# xCLIP, ConvMixer of width 20" in card and "| model.plugins.img.depth | 2 |" in card
    chex.assert_trees_all_equal(*(jax.device_get(weights.load(path)[2]) for path in (str(tmp_path / "own"), run.run)))
    for to in ("hf", "open_clip"):
        with pytest.raises(UserError, match=f"ConvMixer', which '{to}' does not support"):
            export.export(run.run, str(tmp_path / to), to=to)


def test_four_devices_and_microbatches_equal_one():
    changes = {"mesh__strategy": "fsdp", "mesh__fsdp": 2, "optim__microbatches": 2}
    one, many = build.build(config(), jax.devices()[:1]), build.build(config(**changes), jax.devices()[:4])
    batch = tiny.batch(eot=one.tokenizer.eot_id)
    batch["image"] = np.random.default_rng(0).integers(0, 256, (tiny.BATCH, 24, 24, 3), dtype=np.uint8)
    tiny.assert_same_step(one, many, batch)


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ({"img": OPTIONS | {"depht": 2}}, r"'model\.plugins\.img\.depht' is unknown; did you mean .*depth"),
        ({"img": OPTIONS | {"patch": 5}}, r"model\.plugins\.img\.image_size 24 must be a multiple of patch 5"),
        ({"img": {"type": "vot"}}, "unknown image tower 'vot'; did you mean 'vit'"),
        ({"txt": OPTIONS}, "ConvMixer' is not a dataclass derived from"),
        ({"image": OPTIONS}, r"model\.plugins is .*expected groups 'img' and 'txt'"),
    ],
)
def test_wrong_plugins_are_named(plugins, message):
    with pytest.raises(UserError, match=message):
        schema.resolve(tiny.config(model__plugins=plugins))


def test_a_built_in_type_may_be_named():
    config = tiny.config(model__plugins={"img": {"type": "vit", "width": 48, "heads": 4}})
    tower = schema.resolve(config).model.tower("img")
    assert tower.width == 48 and tower.patch == 16 and not tower.scan

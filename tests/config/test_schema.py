"""One golden dump for each config: a change of any key of any experiment shows in the diff.

UPDATE_GOLDEN=1 python -m pytest tests/config/test_schema.py
"""

import importlib
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from absl import flags
from flax.traverse_util import flatten_dict

from docs import generate
from xclip_jax.config import load, recipes, schema
from xclip_jax.core.errors import UserError
from xclip_jax.data import sources
from xclip_jax.models.two_towers import PRESETS
from xclip_jax.train import build, weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CONFIGS = {
    "pretrain": ("pretrain", None),
    "pretrain_clip": ("pretrain", "objective=clip"),
    "pretrain_siglip": ("pretrain", "objective=siglip"),
    "pretrain_nclip": ("pretrain", "objective=nclip"),
    "pretrain_L14": ("pretrain", "preset=L/14,batch=8192,pairs=35000000"),
    "pretrain_cc3m_clip": ("pretrain", "data=cc3m,objective=clip,batch=1024"),
    "pretrain_cc12m": ("pretrain", "data=cc12m"),
    "pretrain_yfcc15m": ("pretrain", "data=yfcc15m,root=gs://bucket/tars,pairs=14000000"),
    "pretrain_35m": ("pretrain", "data=35m"),
    "finetune": ("finetune", None),
    "finetune_L16": ("finetune", "preset=L/16,epochs=50"),
    "finetune_small": ("finetune", "data=folder:/my/set,examples=900,classes=3"),
    "finetune_glue": ("finetune", "data=glue:cola@/data/CoLA,examples=8551,classes=2,weights=runs/mine"),
    "demo": ("demo", None),
    "demo_clip": ("demo", "objective=clip"),
    "demo_siglip": ("demo", "objective=siglip"),
    "demo_nclip": ("demo", "objective=nclip"),
    "small": ("small", "pairs=folder:/my/pairs,count=200,device=cpu"),
    "small_gpu": ("small", "pairs=tar:/my/pairs/*.tar,count=500000,device=gpu,objective=xclip"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_golden(name):
    module, arg = CONFIGS[name]
    config = load.load_config(f"{module}:{arg}" if arg else module)
    dump = "".join(f"{key} = {value!r}\n" for key, value in sorted(schema.flatten(config.to_dict()).items()))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(dump)
    assert dump == path.read_text()


def test_every_config_file_has_a_dump():
    files = {path.stem for path in (GOLDEN.parents[1] / "configs").glob("*.py")} - {"__init__"}
    assert files == {module for module, _ in CONFIGS.values()}


@pytest.mark.parametrize(
    "spec", ["demo", "pretrain:data=cc12m", "small:pairs=none,weights=none", "finetune:data=folder:none,weights=none"]
)
def test_a_recipe_opens_no_data_and_no_weights(spec, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("get_config opens something")

    for module, name in ((weights, "adopt"), (sources, "open_pairs"), (sources, "open_labelled"), (jax, "devices")):
        monkeypatch.setattr(module, name, refuse)
    recipe, _, arg = spec.partition(":")
    config = importlib.import_module(f"configs.{recipe}").get_config(arg)
    assert config.data.sources and config.is_locked


def test_parse_arg():
    parsed = recipes.parse_arg("steps=5,flag,rate=0.5", steps=1, flag=False, rate=1.0, name="x")
    assert parsed.to_dict() == {"steps": 5, "flag": True, "rate": 0.5, "name": "x"}
    assert recipes.parse_arg("name=a,b,flag,steps=5", steps=1, flag=False, name="x").name == "a,b"
    with pytest.raises(UserError, match="'b' is unknown"):
        recipes.parse_arg("steps=5,b", steps=1, name="x")
    with pytest.raises(UserError, match="'stpes' is unknown; did you mean 'steps'"):
        recipes.parse_arg("stpes=5", steps=1, name="x")
    with pytest.raises(UserError, match="steps='many'; expected an integer"):
        recipes.parse_arg("steps=many", steps=1)
    with pytest.raises(UserError, match="objective='clap' must be one of clip, siglip, nclip, xclip"):
        recipes.parse_arg("objective=clap", objective="clip")


@pytest.mark.parametrize("size", PRESETS)
def test_every_preset_of_the_full_size_recipe_builds(size):
    config = load.load_config(f"pretrain:preset={size},batch=64,pairs=640")
    params = flatten_dict(build.build(config).abstract.params, sep="/")
    heads = sum(x.size for name, x in params.items() if name.startswith("clusters"))
    assert 0 < heads < 5 * (sum(x.size for x in params.values()) - heads)
    assert config.model.img.image_size == {"Ti/12": 216}.get(size, 224)
    assert (config.steps, config.checkpoint.every, config.log.expected_epochs) == (250, 200, 25)


def test_unknown_preset():
    with pytest.raises(UserError, match=r"preset is 'B/17'.*'B/16'"):
        recipes.base("clip", "B/17")


@pytest.fixture
def own_flags():
    """Flags that a command line defines are gone after the test."""
    before, parsed = set(flags.FLAGS), flags.FLAGS.is_parsed()
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    (flags.FLAGS.mark_as_parsed if parsed else flags.FLAGS.unparse_flags)()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--config", "configs/demo.py", "--config.optim.lrr=1"], "'optim.lrr' is unknown; did you mean 'optim.lr'?"),
        (["--config", "configs/demo.py", "--config.optimm.lr=1"], "'optimm' is unknown; did you mean 'optim'?"),
        (["--config", "configs/demo.py", "--config.optim.lr=fast"], "expected a number; --help lists the keys"),
        (["--config", "configs/demo.py:objectiv=nclip"], "did you mean 'objective'? Known: objective, steps,"),
        (["--config", "configs/demo.py:preset=X/1"], "it must be one of 'Ti/12', 'S/16',"),
        (["--config", "configs/demo.py", "--confg.optim.lr=1"], "'--confg.optim.lr'; config keys are --config.KEY"),
        (["--config", "configs/demo.py", "--verbosty=1"], "unknown flag '--verbosty'; did you mean '--verbosity'?"),
        (["--config", "configs/nothing.py"], "does not exist; give a path, or a recipe by name: demo, finetune,"),
        (["--config", "elsewhere/demo.py"], "give --config demo"),
        (["--config", "dmo"], "did you mean 'demo'? Recipes: demo, finetune,"),
        (["--config", "demo:steps=0"], "config argument steps='0'; expected at least 1"),
        (["--config", "small"], "needs your pairs: --config small:pairs=PATH, a folder of images"),
        (["--config", "small:pairs=/nowhere"], "no file or folder '/nowhere'; check the path"),
        (["--config", "small:pairs=docs/study,steps=-1"], "config argument steps='-1'; expected above 0"),
        (
            ["--config", "docs/study"],
            "not a recipe; to train on it, write --config small:pairs=docs/study, and xclip-jax",
        ),
        (["--config", "small:pairs=My", "own", "pictures"], "quote a path with spaces: 'small:pairs=My own pictures'"),
        (["--config", "demo", "--config.run=my", "run"], "quote a path with spaces: '--config.run=my run'"),
        (["--config", "demo", "--config.optim.learning_rate=1"], "is unknown; did you mean 'optim.lr'?"),
        (["--config", "demo", "--config.batch_size=1"], "'batch_size' is unknown; did you mean 'data.batch'?"),
        (["--config", "demo", "--config.epochs=1"], "'epochs' is unknown; did you mean 'steps'?"),
        (["--config", "demo", "--lr=1"], "unknown flag '--lr'; did you mean '--config.optim.lr'?"),
        (["--config", "demo", "--batch-size=1"], "'--batch-size'; did you mean '--config.data.batch'?"),
        (
            ["--config", "demo", "--config.data.batch-size=1"],
            "'data.batch-size' is unknown; did you mean 'data.batch'?",
        ),
        (["--config", "demo", "--config.eval.report=maybe"], "report=maybe: expected True or False; --help lists"),
        (
            ["--config", "demo", '--config.data.sources=("folder:flat'],
            "data.sources is '(\"folder:flat'; quotes or brackets are not closed",
        ),
        (["--config", "demo", "--config.data.sources='a','b"], "quotes or brackets are not closed"),
        ([], "--config is missing; start with --config demo"),
        (["small:pairs=flat"], "--config is missing; write --config small:pairs=flat"),
        (["--config.run=x", "demo"], "--config is missing; write --config demo"),
        (["--config", "small:docs"], "config argument 'docs' is a path; to train on it, write small:pairs=docs."),
        (["--config", "configs/demo.py", "optim.lr=1"], "'optim.lr=1'; set config keys with --config.KEY=VALUE"),
        (["--config", "configs/pretrain.py:data=cc4m"], "data is 'cc4m'; it must be one of 'cc3m', 'cc12m',"),
    ],
)
def test_bad_command_lines_are_one_sentence(line, message, own_flags, monkeypatch):
    monkeypatch.chdir(GOLDEN.parents[1])
    with pytest.raises(SystemExit) as stopped:
        load.parse(["xclip-jax", *line])
    assert message in stopped.value.code and stopped.value.code.startswith("error: ")
    assert len(stopped.value.code.splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("configs/pretrain.py", "data.sources is empty; add a source"),
        ("configs/pretrain.py:data=cc12m,root=/nowhere", "no file matches '/nowhere/cc12m/*.tar'; check the path"),
    ],
)
def test_what_a_run_refuses_is_one_sentence(config, message, tmp_path):
    command = [sys.executable, "-m", "xclip_jax.main", "--config", config, f"--config.run={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert done.returncode != 0
    assert message in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "def get_config(arg=None):\n    return int('many')\n",
            "{}, line 2: ValueError: invalid literal for int() with",
        ),
        ("import math\nmath.sqrt('a')\n", "{}, line 2: TypeError: must be real number, not str"),
        ("\nimport no_such_package\n", "{}, line 2: ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = 1\ny = (\n", "{}, line 2: SyntaxError: '(' was never closed"),
        ("x = 1\n", "{} has no function get_config(arg)"),
        ("def get_config():\n    pass\n", "{}: get_config takes one argument: def get_config(arg=None)"),
        (
            "from xclip_jax.config import recipes\n\ndef get_config(arg):\n"
            "    config = recipes.base('clip', 'Ti/12')\n    config.optim.lrr = 1\n",
            "config key 'lrr' is unknown; {}, line 5, sets it.",
        ),
    ],
)
def test_an_error_of_an_own_recipe_has_its_file_and_line(recipe, message, own_flags, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(recipe)
    with pytest.raises(SystemExit) as stopped:
        load.parse(["xclip-jax", "--config", str(file)])
    assert stopped.value.code.startswith(f"error: {message.format(file)}")
    assert len(stopped.value.code.splitlines()) == 1


def test_flatten():
    assert schema.flatten({"a": {"b": 1, "c": (1, 2)}, "d": "x"}) == {"a.b": 1, "a.c": [1, 2], "d": "x"}


@pytest.mark.parametrize("name", generate.PAGES)
def test_pages_made_from_the_code_are_current(name):
    made = generate.PAGES[name]()
    assert (GOLDEN.parents[1] / name).read_text() == made, "run python -m docs.generate"


def test_a_key_that_does_not_exist_is_named_with_the_nearest():
    values = recipes.base("clip", "Ti/12").to_dict() | {"steps": 3}
    values["eval"]["picture"] = True
    with pytest.raises(UserError, match=r"config key 'eval\.picture' is unknown; did you mean 'eval\.\w+'\?"):
        schema.resolve(schema.complete(values))

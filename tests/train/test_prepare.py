import dataclasses

import pytest

from tests.helpers import tiny
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.train import build, prepare


def test_check_needs_neither_data_nor_a_folder(tmp_path):
    config = tiny.config(run=tmp_path / "run", data__sources=("folder:/on/the/pod",), eval__sets=("imagenet",))
    prepare.check_names(config)
    for key, value, message in (
        ("eval__sets_at_end", ("imagenett",), "unknown evaluation set 'imagenett'"),
        ("data__sources", ("foldr:/data",), "unknown source 'foldr:/data'; write .*folder:PATH"),
        ("data__sources", (), r"data\.sources is empty"),
    ):
        with pytest.raises(UserError, match=message):
            prepare.check_names(tiny.config(run=tmp_path / "run", **({"data__sources": ("folder:x",)} | {key: value})))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "extras"),
    [
        ({"data__sources": ("tfds:x/train", "folder:/x"), "log__trackers": ("tensorboard",)}, []),
        ({"data__sources": ("hf:org/name/train",), "log__trackers": ("trackio",)}, ["datasets", "trackio"]),
        ({"data__sources": ("parquet:/x", "demo:train")}, ["demo"]),
        ({"data__sources": ("tar:hf://datasets/org/name/*.tar",)}, ["hub"]),
        ({"eval__sets": ("winoground", "retrieval/parquet:hf://datasets/o/n/x")}, ["datasets", "hub"]),
        ({"eval__sets": ("winoground@parquet:/x",)}, []),
        ({"init__weights": "hf:org/name"}, ["hub"]),
        ({"eval__sets": ("probe/wds:/x",), "eval__sets_at_end": ("wds:hf:org/name",)}, ["hub"]),
        ({"eval__sets": ("emoji/test_concepts", "retrieval/hf:org/name/test")}, ["datasets", "demo"]),
    ],
)
def test_extras_that_a_config_needs(changes, extras):
    assert prepare.extras(prepare.check_names(tiny.config(**({"data__sources": ("folder:x",)} | changes)))) == extras


def test_class_names_without_such_a_class_are_refused(tmp_path):
    (tmp_path / "names.json").write_text('{"cta": "a kitten"}')
    config = tiny.config(
        eval__sets=(f"folder:{tiny.classes(tmp_path / 'set', 2)}",), eval__class_names=str(tmp_path / "names.json")
    )
    experiment = build.build(schema.resolve(config))
    with pytest.raises(UserError, match="none of the class names, such as 'cta', is among the classes of the sets"):
        prepare.open_evaluators(experiment, build.make_encoder(experiment))


@pytest.mark.parametrize(
    ("objective", "weights", "evaluated"), [("clip", "given", ["set"]), ("clip", "", []), ("classify", "given", [])]
)
def test_given_weights_are_evaluated_but_no_classifier_before_its_training(objective, weights, evaluated, tmp_path):
    config = tiny.config(objective, run=tmp_path / "run", init__weights=weights, objective__classify__classes=3)
    parts = dict.fromkeys(field.name for field in dataclasses.fields(prepare.Run))
    parts |= {"config": schema.resolve(config), "experiment": build.build(config), "evaluators": {"name": "set"}}
    run = prepare.Run(**parts)
    assert run.evaluators_of(0) == evaluated and run.final_evaluators == ["set"]

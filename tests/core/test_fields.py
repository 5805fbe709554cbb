"""Values that a config does not allow: each gives one sentence with key, value and what is allowed, before any file."""

import re

import pytest

from tests.helpers import tiny
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.train import trainer

NAN = float("nan")
# (key, value, what the sentence says beside both), a row for each kind of check: docs/config.md has those of all keys
BAD = [
    ("run", "", "string that is not empty"),
    ("seed", -1, "from 0 to 4294967295"),
    ("steps", True, "an integer"),
    ("init.freeze", ("image",), "'img', 'txt'"),
    ("mesh.data", 0, "-1 for the rest"),
    ("mesh.strategy", "ddp", "'dp', 'zero1', 'fsdp', 'fsdp_tp'"),
    ("model.img.drop_path", 1.0, "at least 0 and below 1"),
    ("objective.terms", {"clip": -1.0}, "at least 0"),
    ("objective.terms", 0.3, "a group of keys"),
    ("optim.lr", 1e39, "float32 can hold"),
    ("optim.lr", NAN, "a number"),
    ("optim.lr", "fast", "a number"),
    ("optim.lr", 3e37, "at most 1000"),
    ("optim.b1", 0.9999999999, "at least 0 and below 1"),  # 1 in float32: no bias correction
    ("data.sources", "folder:x", "a tuple of strings"),
    ("data.crop_scale", (0.5,), "a tuple of 2 values"),
    ("data.flip_prob", 2.0, "from 0 to 1"),
    ("data.caption_transform", "my_lab.captions:shorten", "package.module:function:FIELD"),
]
FROZEN = {"init.freeze": ("img", "txt")}
LORA = {"init.weights": "x", "finetune.lora.rank": 2}
CLASSIFY = {"objective.name": "classify", "objective.terms": {"classify": 1.0}}
# Values that are allowed by themselves and not together.
CONFLICTS = [
    ({"model.img.patch": 5}, r"model\.img\.image_size 16 must be a multiple of patch 5"),
    ({"model.img.heads": 5}, r"model\.img\.width 32 must be a multiple of heads 5"),
    ({"model.txt.heads": 5}, r"model\.txt\.width 32 must be a multiple of heads 5"),
    ({"model.img.mlp_ratio": 0.01}, r"model\.img\.mlp_ratio 0\.01 of width 32 leaves"),
    ({"optim.warmup": 10}, r"optim\.warmup=10 must be below the 10 steps"),
    ({"optim.lr": 5e-6}, r"optim\.lr_end 1e-05 is above optim\.lr 5e-06, the peak; lower it, as to 0"),
    ({"optim.microbatches": 3}, r"optim\.microbatches=3 must divide data\.batch=16"),
    ({"loss.chunk_size": 5}, r"loss\.chunk_size=5 must divide data\.batch=16"),
    ({"objective.terms": {"clip": 0.0, "nclip": 0.0}}, r"objective\.terms is .* a weight above 0"),
    ({"objective.terms": {}}, r"objective\.terms is .* a weight above 0"),
    ({"objective.name": "mine", "objective.terms": {"clap": 1.0}}, "objective term 'clap'; did you mean 'clip'"),
    ({"objective.name": "nclip"}, r"objective\.name is 'nclip', whose terms are nclip, and terms has clip, nclip"),
    ({"objective.name": "mine", "objective.terms": {"clip": 1.0, "classify": 1.0}}, "use one kind"),
    ({"objective.plugins": {"clap": {"type": "no.such:Clap"}}}, r"objective\.plugins\.clap has no weight"),
    (
        {"objective.name": "mine", "objective.terms": {"x": 1.0}, "objective.plugins": {"x": {"type": "no.such:X"}}},
        r"objective\.terms\.x: objective term 'no\.such:X' cannot be imported",
    ),
    (CLASSIFY, r"objective\.classify\.classes is 0"),
    (CLASSIFY | {"objective.classify.classes": 1, "objective.classify.mixup": 0.8}, "both to 0"),
    (CLASSIFY | {"objective.classify.classes": 1, "objective.classify.smoothing": 0.1}, "one class is a number"),
    (CLASSIFY | {"objective.classify.classes": 3, "init.freeze": ("txt",)}, r"init\.freeze"),
    ({"data.weights": (1.0, 2.0)}, r"data\.weights is \(1\.0, 2\.0\)"),
    ({"data.weights": (0.0,)}, r"data\.weights is \(0\.0,\)"),
    ({"data.crop_scale": (1.0, 0.5)}, r"data\.crop_scale is \(1\.0, 0\.5\)"),
    ({"data.crop_scale": (-1.0, 0.5)}, r"data\.crop_scale is \(-1\.0, 0\.5\)"),
    ({"data.crop_scale": (0.5, 2.0)}, r"data\.crop_scale is \(0\.5, 2\.0\)"),
    ({"optim.on_bad_steps": "rewind", "checkpoint.every": 0}, r"^optim\.on_bad_steps .*checkpoint\.every"),
    (LORA | {"optim.name": "muon"}, r"^optim\.name is 'muon', and finetune\.lora\.rank .*optim\.lr"),
    (FROZEN | {"optim.name": "muon"}, r"^optim\.name is 'muon', and init\.freeze"),
    (FROZEN | LORA, r"^finetune\.lora\.rank .*init\.freeze"),
    ({"eval.resize_size": 3}, r"^eval\.resize_size is 3.*at least 16 pixels"),
]


def changed(run, changes):
    return tiny.changed(tiny.config(run=run, data__sources=("folder:nowhere",)).to_dict(), changes, ".")


@pytest.mark.parametrize(("key", "value", "allowed"), BAD, ids=lambda x: str(x)[:30])
def test_a_value_that_is_not_allowed(key, value, allowed):
    with pytest.raises(UserError, match=re.escape(f"{key} is {value!r}; expected ") + ".*" + re.escape(allowed)):
        schema.resolve(changed("run", {key: value}))


@pytest.mark.parametrize(("changes", "message"), CONFLICTS, ids=lambda x: str(x)[:50])
def test_values_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        schema.resolve(changed("run", changes))


def test_a_run_refuses_before_its_folder_is_made(tmp_path):
    for changes in ({"optim.lr": 0.0}, {"optim.warmup": 10}):
        with pytest.raises(UserError, match=next(iter(changes))):
            trainer.run(changed(tmp_path / "run", changes))
    assert not (tmp_path / "run").exists()


def test_all_faults_are_reported_at_once():
    values = changed("run", {"optim.lr": -1.0, "data.batch": 0, "steps": 0, "optim.warmup": -1})
    values["optim"]["lrr"] = values["evil"] = 1
    with pytest.raises(UserError) as caught:
        schema.resolve(values)
    lines = str(caught.value).splitlines()
    assert lines[0] == "6 values of the config are wrong:"
    assert [line.strip() for line in lines[1:]] == [
        "config key 'evil' is unknown; did you mean 'eval'?",
        "steps is 0; expected at least 1.",
        "config key 'optim.lrr' is unknown; did you mean 'optim.lr'?",
        "optim.lr is -1.0; expected a value above 0.",
        "optim.warmup is -1; expected at least 0.",
        "data.batch is 0; expected at least 1.",
    ]


def test_every_key_has_a_doc_string_and_a_default_that_is_allowed():
    rows = list(schema.fields.describe(schema.Config))
    assert len(rows) > 100
    assert all(doc for _, _, _, doc in rows)
    config = schema.default()
    config.steps = 1
    resolved = schema.resolve(config)
    flat = schema.flatten(schema.to_dict(resolved))
    assert flat == schema.flatten(schema.to_dict(schema.Config())) | {"steps": 1}
    open_groups = {"objective.terms", "objective.plugins", "model.plugins"}  # their keys are the run's own
    assert {name for name, *_ in rows} - open_groups == {
        key for key in flat if key.rpartition(".")[0] not in open_groups
    }


def test_facts_of_a_group_are_those_of_its_keys():
    logs = [name for name, *_ in schema.fields.describe(schema.Config) if name.startswith("log.")]
    assert {*logs} < {*schema.keys_where(resume="free")}
    assert {*logs, "run", "eval.report"} < {*schema.keys_where(resume="free", compared=False)}
    assert schema.keys_where(resume="free", card="batch") == () and schema.keys_where(card="batch") == ("data.batch",)
    assert schema.fields.keys_where(schema.DataConfig, card="batch") == ("batch",)


def test_a_misspelt_key_and_a_group_that_is_a_value():
    with pytest.raises(AttributeError, match="does not exist"):
        schema.default().optim.misspelt = 1
    with pytest.raises(UserError, match=r"optim is 3; expected a group of keys"):
        schema.resolve(changed("run", {}) | {"optim": 3})

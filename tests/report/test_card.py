"""The model card: what it shows of names and paths. tests/commands/test_export.py has whole ones."""

import dataclasses
import re
import shutil
import types

import pytest
import yaml

from tests.helpers import tiny
from xclip_jax.commands import evaluate, export
from xclip_jax.config import schema
from xclip_jax.core.run_folder import RunReader
from xclip_jax.evaluators.results import Result
from xclip_jax.report import card
from xclip_jax.train import build, weights
from xclip_jax.train.run_writer import RunWriter


def test_names_of_others_are_no_markdown_in_a_card(run):
    markdown = pytest.importorskip("markdown")
    hostile = ["cat\n\n# Safe weights", "<img src=x onerror=y>", "[here](https://x.org)", "`<b>` www.x.org", "a | b"]
    folder = RunReader(run)
    folder.read_classes = lambda: hostile
    config = schema.resolve(schema.complete(folder.read_config()["config"]))
    folder.read_sources = lambda: [{"samples": 1}] * len(config.data.sources)
    experiment = build.build(config)
    experiment = dataclasses.replace(experiment, objective=types.SimpleNamespace(labelled=True))
    classes = card.data(folder, experiment)["about_data"]
    assert classes.endswith(
        "`cat # Safe weights`, `<img src=x onerror=y>`, `[here](https://x.org)`, `'<b>' www.x.org`, `a | b`"
    )
    data = dataclasses.replace(config.data, negatives=2, negative_columns=("wrong", "more"))
    experiment = dataclasses.replace(build.build(config), config=dataclasses.replace(config, data=data))
    assert card.data(folder, experiment)["about_data"].endswith("from text; 2 negatives, from wrong, more")
    words = card.in_words("one <img src=x>\n# two [here](https://x.org)")
    for text in (classes, f"| protocol |\n| --- |\n| {words} |"):
        page = markdown.markdown(text, extensions=["tables"])
        assert not re.search("<(img|a|b|h1)[ >]", page), page


def test_a_card_has_the_results_of_the_loaded_weights_with_their_protocol(tmp_path):
    run, other = (str(tiny.untrained(tmp_path / name, seed=seed)) for seed, name in enumerate("ab"))
    suite = f"folder:{tiny.classes(tmp_path / 'set', 4)}"
    evaluate.evaluate(run, suite, changes={"templates": ["a {c}", "one {c}"]})
    export.export(run, str(tmp_path / "out"), to="safetensors")
    lines = (tmp_path / "out" / export.CARD).read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| `folder:set`")]
    (result,) = card.measured(RunReader(run), weights.load(run))
    assert result.protocol.protocol and f"| 8 | {result.protocol.protocol} | a {{c}} \\| one {{c}} |" in row
    # The end of training evaluated this set, too, and another one.
    loaded = weights.load(run)
    ended = [dataclasses.replace(result, set=name, value=1.0) for name in (result.set, "folder:other")]
    RunWriter(run).write_results(loaded.config, ended)
    loaded = loaded._replace(config=dataclasses.replace(loaded.config, steps=loaded.step))
    found = {x.set: x.value for x in card.measured(RunReader(run), loaded)}
    assert found == {result.set: result.value, "folder:other": 1.0}
    # Checkpoints of another model in their place have no results yet.
    shutil.rmtree(f"{run}/checkpoints")
    shutil.copytree(f"{other}/checkpoints", f"{run}/checkpoints")
    assert not card.measured(RunReader(run), weights.load(run))


def test_a_card_has_no_path_of_the_machine():
    for text, public in {
        "tar:/data/cc12m/{00000..01242}.tar": "tar:cc12m/{00000..01242}.tar",
        "folder:/home/me/My Pictures/pairs/": "folder:pairs",
        "my_lab.sources:JsonLines:/data/x.jsonl": "my_lab.sources:JsonLines:x.jsonl",
        '--key=("folder:~/a","csv:gs://bucket/b/c.csv")': '--key=("folder:a","csv:c.csv")',
        "imagenet@/data/val": "imagenet@val", "hf:/data/own/test": "hf:test", "/lib/xclip_jax/main.py": "main.py",
        **dict.fromkeys(["hf:lab/x@v1/test", "wds:hf:lab/x", "runs/mine", "https://host/a/b", "/", "a / b"]),
    }.items():  # fmt: skip
        assert card.shown(text) == (public or text)
    names = ["zeroshot/folder:/a/x", "zeroshot/folder:/b/x", "my_lab.sets:Own:/c/y", "retrieval/hf:lab/z/test"]
    assert list(card.names_of_sets(names).values()) == [
        "zeroshot/folder:a/x", "zeroshot/folder:b/x", "my_lab.sets:Own:y", "retrieval/hf:lab/z/test"
    ]  # fmt: skip
    config = schema.resolve(tiny.config("clip"))
    names = ["wds:hf:lab/set", "hf:lab/other@v1/test", "hf:lab/other@v1/test?label=fine"]
    measured = [Result(name, "zeroshot", key, 50.0, headline=True) for name in names for key in ("top1", "top5")]
    head = card.metadata(build.build(config), "hf", measured)
    (index,) = yaml.safe_load(head)["model-index"]
    assert [(row["dataset"]["type"], row["dataset"]["name"]) for row in index["results"]] == [
        ("lab/set", names[0]), ("lab/other", names[1]), ("lab/other", names[2])
    ]  # fmt: skip
    assert [[metric["type"] for metric in row["metrics"]] for row in index["results"]] == [["top1", "top5"]] * 3

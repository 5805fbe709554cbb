"""Sizes that follow from the pairs and the machine."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
from PIL import Image

from configs import small
from tests.helpers import tiny
from xclip_jax.config import load, schema
from xclip_jax.core.errors import UserError
from xclip_jax.data import holdout, sources, tokenizer
from xclip_jax.train import cost


def config(count, device="cpu", **arguments):
    given = {"pairs": "folder:/my/pairs", "count": count, "device": device} | arguments
    return load.load_config("small:" + ",".join(f"{key}={value}" for key, value in given.items()))


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """128 images in four sub-folders, with 16 captions."""
    folder, rng = tmp_path_factory.mktemp("discs") / "pairs", np.random.default_rng(0)
    for i in range(128):
        name, ground = (("red", "green", "blue", "pink")[n % 4] for n in (i, i // 4))
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (36, 48, 3), dtype=np.uint8)).save(folder / name / f"{i:03d}.png")
        (folder / name / f"{i:03d}.txt").write_text(f"a {name} disc on {ground}")
    return folder


@pytest.mark.parametrize(
    ("count", "device", "preset", "batch", "clusters", "holdout"),
    [
        (20, "cpu", "Ti/12", 8, 256, 0.2),
        (1_000, "cpu", "Ti/12", 256, 1024, 0.05),
        (5_000, "gpu", "Ti/12", 1024, 1024, 0.05),
        (200_000, "gpu", "S/16", 2048, 4096, 0.025),
        (10_000_000, "tpu", "B/16", 4096, 32_768, 0.0005),
    ],
)
def test_sizes_follow_from_the_number_of_pairs(count, device, preset, batch, clusters, holdout):
    c = config(count, device)
    resolved = schema.resolve(c)
    width, patch = {"Ti/12": (192, 12), "S/16": (384, 16), "B/16": (768, 16)}[preset]
    assert (c.model.img.width, c.model.img.patch, c.data.batch) == (width, patch, batch)
    assert (c.model.cluster_head.clusters, c.data.holdout) == (clusters, holdout)
    assert c.model.dtype == ("float32" if device == "cpu" else "bfloat16")
    trained = count * (1 - holdout)
    assert 24 <= c.steps * batch / trained <= 101  # epochs
    assert batch <= trained / 2
    if preset == "Ti/12":
        assert c.optim.name == "muon" and c.optim.warmup == int(0.6 * min(c.steps, 4000))
        assert c.optim.lr <= 8e-3 * math.sqrt(batch / 256) * 1.01
        assert c.optim.lr / c.optim.warmup <= 8e-3 / 300 * 1.01  # as slowly as where it was tuned
        assert c.optim.weight_decay == 0.05
    else:
        assert c.optim.name == "adamw"
        assert c.optim.warmup < c.steps / 5 and c.optim.lr == (1e-3 if preset == "S/16" else 5e-4)
        assert resolved.optim.lr <= 8.1e-3 * math.sqrt(resolved.data.batch / 4096)  # of ViT-B's 1e-3 at 4,096
    assert 3 * resolved.optim.warmup <= 2 * resolved.steps
    assert c.steps >= 10 * c.checkpoint.every or c.checkpoint.every == min(200, c.steps)
    assert c.steps / c.eval.every < 17 and (c.steps / c.eval.every >= 8 or c.eval.every == 20)
    assert resolved.eval.sets == ("retrieval/holdout",)


@pytest.mark.parametrize("preset", ["", "B/16"])
def test_cluster_heads_are_cheap_beside_any_towers(preset):
    """At most a twentieth of a step, no more clusters than pairs, and never larger than the towers."""
    clusters, patch = {}, preset.partition("/")[2]
    sizes = [{"preset": preset}, {"preset": preset, "size": patch}] if preset else [{}]  # a patch alone is cheapest
    for count, size in itertools.product((100, 33_000, 3_000_000), sizes):
        c = schema.resolve(config(count, "gpu", objective="xclip", **size))
        head, widths = c.model.cluster_head, c.model.widths
        blocks = sum(12 * tower.depth * tower.width**2 for tower in (c.model.img, c.model.txt))  # their kernels
        assert head.layers == 0 and sum(widths.values()) * head.clusters < blocks
        small = c.model.img.width == 192
        assert 256 <= head.clusters <= (1024 if small else min(max(count, 256), 32_768))
        flops = cost.forward_flops(c)
        assert flops["heads"] <= 0.05 * sum(flops.values())
        clusters.setdefault(count, head.clusters)
    assert (clusters[100], clusters[33_000]) == (256, 1024) and clusters[3_000_000] == (1024 if small else 32_768)


def test_rates_warm_up_and_intervals():
    c = config(20_000, objective="xclip")  # CLIP alone has twice the rate
    assert (c.optim.name, c.optim.lr, c.optim.warmup) == ("muon", 4e-3, min(c.steps, 4000) // 2)
    for steps in (1, 40):
        c = schema.resolve(config(1000, steps=steps))
        assert (c.steps, c.eval.every, c.log.every) == (steps, min(steps, 20), max(steps // 20, 1))
        assert c.optim.warmup == int(0.6 * steps)
    assert config(100_000_000, "gpu").checkpoint.every == 1000  # hours of work may be lost at most
    assert [config(5000, epochs=n).steps for n in (1, 0.5)] == [19, 9]


def test_what_cannot_be_trained_is_refused(tmp_path):
    tiny.folder(tmp_path / "pairs", 7)
    refused = {f"pairs={tmp_path / 'pairs'},tokenizer=bytes": r"pairs' has 7 pairs", "device=cpu": "needs your pairs"}
    for given in ("epochs=nan", "steps=-1", "epochs=2,steps=5"):
        refused[f"pairs=folder:x,count=1000,device=cpu,{given}"] = given.partition("=")[0]
    for arguments, named in refused.items():
        with pytest.raises(UserError, match=named):
            load.load_config(f"small:{arguments}")


def test_other_pairs_have_another_folder_and_no_secret_in_its_name():
    specs = ["folder:фото/кошки", "folder:写真/犬", "tar:...", "csv:/"]
    specs += [f"folder:/home/{name}/{'data/' * 9}train" for name in ("alice", "bob")]
    names = [small.run_name(spec) for spec in specs]
    assert len(set(names)) == len(specs) and names[0] == "фото-кошки"
    assert small.run_name("tar:my/pairs/*.tar") == "my-pairs-.tar"
    assert all(re.fullmatch(r"\w[\w.-]*", name) and len(name) < 48 for name in names), names
    assert small.run_name("tar:https://alice:hunter2@host/p.tar") == small.run_name("tar:https://host/p.tar")


def test_memory_time_and_devices_of_the_machine():
    """Activations take a quarter of the memory, a CPU is not asked for days, and devices get equal parts."""
    plain, gpu = config(10_000_000, "gpu"), small.ORDINARY["gpu"]
    for size in (12, 80):
        machine = dataclasses.replace(gpu, memory=size * 2**30)
        parts = small.microbatches(plain, machine)
        held = plain.data.batch / parts * cost.activation_bytes(plain)
        assert held <= machine.memory / 4 and (parts == 1 or 2 * held > machine.memory / 4)
    slow = config(1_000_000)
    assert slow.steps * slow.data.batch == pytest.approx(995_000, rel=0.01)  # one epoch, for want of more time
    six = dataclasses.replace(gpu, devices=6)
    assert (small.batch_size(180, "Ti/12", six), small.batch_size(10, "Ti/12", six)) == (48, 6)
    for devices in (3, 7, 12):  # of which each has a power of two
        batch = small.batch_size(10_000_000, "B/16", dataclasses.replace(gpu, devices=devices))
        assert batch % devices == 0 and math.log2(batch // devices).is_integer() and 2048 < batch <= 4096


def test_counts_are_those_of_the_pairs(tmp_path):
    folder = tiny.folder(tmp_path / "pairs", 10)
    for i in range(4):
        (folder / f"{i:03d}.txt").write_text("the same")

    def measured():
        return small.measure(sources.open_pairs(f"folder:{folder}"), tokenizer.load("bytes"))

    assert measured() == small.Counts(10, 24, 22, tokens=11)
    (folder / "007.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^1 of 10 pairs that were read cannot be used, the first is .*/007\.png' "):
        measured()
    tiny.folder(folder, 10)
    for file in folder.glob("*.txt"):
        file.write_text("a thing")
    with pytest.raises(UserError, match=r"^all 10 captions that were read are 'a thing': there is nothing to learn"):
        measured()


def table(folder, name, **columns):
    """A table of captions in named columns, on a few images."""
    tiny.folder(folder / "images", 40)
    rows = [["image", *columns]]
    rows += ([f"images/{i % 40:03d}.png", *texts] for i, texts in enumerate(zip(*columns.values(), strict=True)))
    (folder / name).write_text("".join("\t".join(row) + "\n" for row in rows))
    return f"csv:{folder / name},text={','.join(columns)},tokenizer=bytes"


def test_repeats_are_counted_in_all_pairs(tmp_path, monkeypatch):
    """A tenth of the pairs are twins, of which 512 pairs at random show an eighth."""
    titles = [f"title {i // 2 if i < 400 else i}" for i in range(4000)]
    chosen = np.random.default_rng(0).choice(4000, small.SAMPLE, replace=False)
    sample = [titles[i] for i in chosen]
    assert sum(sample.count(title) > 1 for title in sample) < 0.02 * len(sample)
    c = load.load_config(f"small:pairs={table(tmp_path, 'twins.tsv', text=titles)}")
    assert c.data.spread_duplicate_captions
    few = table(tmp_path, "few.tsv", text=[*titles[330:], *map(str, range(330))])  # 70 of 4,000
    assert not load.load_config(f"small:pairs={few}").data.spread_duplicate_captions
    # The pairs are not read again to train.
    monkeypatch.setattr(holdout.records, "read_each", lambda *_, **__: pytest.fail("read again"))
    assert sources.open_sources(schema.resolve(c).data, fields=("image", "text"))


def test_the_context_is_long_enough_for_every_column(tmp_path):
    """And captions differ if one of them does, as in the order of a run."""
    others = [f"number {i} of the captions in another column" for i in range(40)]
    c = load.load_config(f"small:pairs={table(tmp_path, 'x.tsv', text=['a'] * 40, other=others)}")
    assert c.model.txt.context_length == 48 and not c.data.spread_duplicate_captions


def test_the_pairs_decide_on_size_context_and_captions_apart(discs):
    c, describe = load.load_recipe(f"small:pairs={discs},tokenizer=bytes")
    assert describe(c) == (
        "small: 128 pairs, 16 % of them held out; clip (on titles like these xclip is not shown to pay, "
        "unlike SuperCLIP's tokens in examples/superclip.py: docs/verdicts.md), Ti/12, 36 px, 24 tokens, "
        f"batch {c.data.batch}, {c.steps} steps ({c.steps * c.data.batch / (0.84 * 128):.3g} epochs), "
        f"muon at {c.optim.lr:g}, tuned on icons and photographs"
    )
    assert c.data.sources == (f"folder:{discs}",) and re.fullmatch(r"runs/small-.*pairs-[0-9a-f]{6}", c.run)
    assert (c.model.img.image_size, c.model.txt.context_length) == (36, 24)
    assert c.data.spread_duplicate_captions and c.data.cache
    assert c.eval.sets == ("retrieval/holdout", "zeroshot/holdout")
    assert load.load_config(f"small:pairs={discs},tokenizer=bytes").to_dict() == c.to_dict()  # so that it resumes


def test_some_of_a_few_pairs_are_held_out_whatever_their_hashes(tmp_path, monkeypatch):
    folder, original = tiny.folder(tmp_path / "pairs", 8), holdout.is_held_out
    monkeypatch.setattr(holdout, "is_held_out", lambda digits, share: share >= 0.4 and original(digits, share))
    c = load.load_config(f"small:pairs={folder},tokenizer=bytes")
    assert c.data.holdout == 0.4
    assert 0 < len(sources.open_sources(schema.resolve(c).data)[0]) < 8


def test_a_table_and_its_columns(tmp_path):
    folder = tiny.folder(tmp_path / "pairs", 12)
    rows = [f"pairs/{i:03d}.png,picture {i}" for i in range(12)]
    (tmp_path / "all.csv").write_text("\n".join(["path,words", *rows]))
    c = load.load_config(f"small:pairs={tmp_path / 'all.csv'},image=path,text=words:0.8,tokenizer=bytes")
    assert c.data.sources == (f"csv:{tmp_path / 'all.csv'}",) and c.data.text_columns == ("words:0.8",)
    assert c.eval.sets == ("retrieval/holdout",) and not c.data.spread_duplicate_captions
    assert folder.exists()
    # Before flags are read, the remedy is an argument.
    with pytest.raises(
        UserError, match=r"no column 'image'; its columns are 'path', 'words'; name its .*small:.*,image"
    ):
        load.load_config(f"small:pairs={tmp_path / 'all.csv'}")


def test_held_out_classes_are_left_out_where_they_cannot_be_evaluated(tmp_path):
    """No pair of the second class is held out, whatever bytes this version of Pillow writes."""
    tiny.folder(tmp_path / "pairs" / "cat", 40)
    for seed in itertools.count(1):
        image = tiny.folder(tmp_path / "pairs" / "dog", 1, seed) / "000.png"
        if not holdout.selected([image.read_bytes()], small.LARGEST_SHARE):
            break
    c, describe = load.load_recipe(f"small:pairs={tmp_path / 'pairs'},tokenizer=bytes")
    assert c.eval.sets == ("retrieval/holdout",)
    assert "by retrieval, which does not show how well images are named: that needs images of two" in describe(c)


@pytest.mark.parametrize(
    ("captions", "reason"),
    [
        (["a fox", "hens"], "; clip (with label smoothing it beats xclip on names like these captions: docs"),
        (
            ["Turtle Check Men Navy Blue Shirt by Brand"],
            "; clip (on titles like these xclip is not shown to pay, unlike SuperCLIP's tokens in examples",
        ),
        ([], "; clip (no study here compared it with xclip on captions like these: "),
    ],
)
def test_a_reason_for_the_objective(tmp_path, captions, reason):
    folder = tiny.folder(tmp_path / "pairs", 24)
    for i in range(24):
        names = captions or [f"photograph {i} of a fox in the snow at night"]
        (folder / f"{i:03d}.txt").write_text(f"{names[i % len(names)]} {'a' * (not i)}")
    c, describe = load.load_recipe(f"small:pairs={folder}")
    assert reason in describe(c)
    assert "docs/verdicts.md" not in small.summary(c, 24)  # of a chosen objective


def test_the_description_is_that_of_the_config_with_its_flags():
    c, describe = load.load_recipe("small:pairs=folder:x,count=1000,device=cpu,objective=xclip")
    assert "; xclip (0.5 clip + 0.5 nclip), 1,024 clusters, Ti/12, 96 px, 32 tokens, batch 256, " in describe(c)
    c.unlock()
    c.objective.terms.nclip, c.model.cluster_head.clusters, c.model.img.depth = 0.25, 512, 6
    c.steps, c.data.batch, c.data.holdout, c.optim.name, c.optim.lr = 30, 16, 0.2, "adamw", 2e-3
    assert describe(c) == (
        "small: 1,000 pairs, 20 % of them held out; xclip (0.5 clip + 0.25 nclip), 512 clusters, towers of other sizes "
        "than a preset, 96 px, 32 tokens, batch 16, 30 steps (0.6 epochs), adamw at 0.002"
    )
    c.data.drop = "suspects.jsonl"  # an epoch has fewer pairs
    assert "30 steps (0.6 epochs without data.drop), adamw" in describe(c)

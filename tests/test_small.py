"""The recipe for own pairs: sizes that follow from the pairs and the machine, and a run from pairs to results."""

import colorsys
import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from xclip_jax.config import load, schema
from xclip_jax.configs import small
from xclip_jax.data import sources, tokenizer
from xclip_jax.errors import UserError
from xclip_jax.train import trainer


def config(count, device="cpu", **arguments):
    given = {"pairs": "folder:/my/pairs", "count": count, "device": device} | arguments
    return small.get_config(",".join(f"{key}={value}" for key, value in given.items()))


def drawn(folder, n=60):
    """Discs on a ground in `folder`, sub-folders of it by their colour; captions name both."""
    hues = {"red": 0.0, "green": 0.35, "blue": 0.6, "pink": 0.9}
    for i, (name, ground, radius) in zip(range(n), itertools.cycle(itertools.product(hues, hues, range(4, 12)))):
        rows, columns = np.mgrid[:36, :48]
        disc = (rows - 18) ** 2 + (columns - 20 - i % 5) ** 2 < radius**2
        colours = [[int(255 * x) for x in colorsys.hsv_to_rgb(hues[key], 0.9, 0.8)] for key in (ground, name)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(disc[..., None], *colours[::-1]).astype(np.uint8)).save(folder / name / f"{i:02d}.png")
        (folder / name / f"{i:02d}.txt").write_text(f"a {name} disc on {ground}")
    return folder


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    # The first 60 of the product have two colours alone.
    return drawn(tmp_path_factory.mktemp("discs") / "pairs", 128)


@pytest.mark.parametrize(
    ("count", "device", "preset", "batch", "clusters", "holdout"),
    [
        (20, "cpu", "Ti/12", 8, 256, 0.2),
        (200, "cpu", "Ti/12", 64, 256, 0.1),
        (5_000, "cpu", "Ti/12", 256, 4096, 0.05),
        (5_000, "gpu", "Ti/12", 1024, 4096, 0.05),
        (200_000, "gpu", "S/16", 2048, 32_768, 0.025),
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
    assert batch <= trained / 2 and c.optim.warmup < c.steps / 5
    assert c.steps >= 10 * c.checkpoint.every or c.checkpoint.every == min(200, c.steps)
    assert 8 <= c.steps / c.eval.every < 17 and resolved.eval.sets == ("retrieval/holdout",)


def test_a_step_takes_no_more_than_half_of_the_memory():
    plain, machine = config(10_000_000, "gpu"), small.ORDINARY["gpu"]
    assert plain.optim.microbatches > 8
    for memory in (8, 16, 80):
        parts = small.microbatches(plain, dataclasses.replace(machine, memory=memory * 2**30))
        held = plain.data.batch / parts * small.activation_bytes(plain)
        assert held <= memory * 2**29 and (parts == 1 or 2 * held > memory * 2**29)
    assert config(200).optim.microbatches == 1


def test_a_cpu_is_not_asked_for_days():
    slow, fast = config(1_000_000), config(1_000_000, epochs=3)
    assert slow.steps * slow.data.batch == pytest.approx(995_000, rel=0.01)  # one epoch, for want of more time
    assert fast.steps == pytest.approx(3 * slow.steps, rel=0.01)
    few, more = (small.Machine("cpu", 1, 2**33, cores) for cores in (2, 64))
    steps = []
    for machine in (few, more):
        c = config(20_000)
        small._schedule(c, machine, 19_000, 0)
        steps.append(c.steps)
    assert steps[0] < steps[1]


def test_batches_are_in_equal_parts_for_the_devices():
    machine = dataclasses.replace(small.ORDINARY["gpu"], devices=6)
    assert small.batch_size(180, "Ti/12", machine) == 60
    assert small.batch_size(10, "Ti/12", machine) == 6


def test_counts_are_those_of_the_pairs(tmp_path):
    folder = tiny.folder(tmp_path / "pairs", 10)
    for i in range(4):
        (folder / f"{i:03d}.txt").write_text("the same")
    (folder / "009.txt").unlink()
    counts = small.measure(sources.open_pairs(f"folder:{folder}"), tokenizer.load("bytes"))
    assert counts == small.Counts(10, 24, 22, tokens=11, repeats=4 / 9)
    (folder / "000.txt").write_text("")
    for file in folder.glob("*.txt"):
        file.write_text("")
    with pytest.raises(UserError, match="none of the 10 pairs that were read can be used"):
        small.measure(sources.open_pairs(f"folder:{folder}"), tokenizer.load("bytes"))


def test_the_pairs_decide_on_size_context_and_captions_apart(discs):
    c = load.load_config(f"small:pairs={discs},tokenizer=bytes")
    assert c.data.sources == (f"folder:{discs}",) and c.run.endswith("pairs")
    assert (c.model.img.image_size, c.model.txt.context_length) == (36, 24)
    assert c.data.spread_duplicate_captions and c.data.cache
    assert c.eval.sets == ("retrieval/holdout", "zeroshot/holdout")
    assert load.load_config(f"small:pairs={discs},tokenizer=bytes").to_dict() == c.to_dict()  # so that it resumes
    assert load.load_config(f"small:pairs={discs},tokenizer=bytes,size=24").model.img.image_size == 24


def test_a_table_and_its_columns(tmp_path):
    folder = tiny.folder(tmp_path / "pairs", 12)
    rows = [f"pairs/{i:03d}.png,picture {i}" for i in range(12)]
    (tmp_path / "all.csv").write_text("\n".join(["path,words", *rows]))
    c = load.load_config(f"small:pairs={tmp_path / 'all.csv'},image=path,text=words,tokenizer=bytes")
    assert c.data.sources == (f"csv:{tmp_path / 'all.csv'}",) and c.data.text_keys == ("words",)
    assert c.eval.sets == ("retrieval/holdout",) and not c.data.spread_duplicate_captions
    assert folder.exists()


def test_sizes_of_weights_are_taken_over(discs, run):
    c = load.load_config(f"small:pairs={discs},weights={run}")
    saved = json.loads((run / "config.json").read_text())["config"]
    assert c.model.img.image_size == saved["model"]["img"]["image_size"] and c.model.embed == saved["model"]["embed"]
    assert c.objective.name == "xclip" and c.data.tokenizer == "bytes" and c.init.weights == str(run)
    scratch = load.load_config(f"small:pairs={discs},tokenizer=bytes")
    assert c.optim.lr < scratch.optim.lr / 10 and c.steps * c.data.batch < scratch.steps * scratch.data.batch / 4
    assert load.load_config(f"small:pairs={discs},weights={run},objective=clip").objective.terms.to_dict() == {
        "clip": 1.0
    }
    schema.resolve(c)


def test_a_run_from_pairs_to_results(discs, tmp_path):
    c = load.load_config(f"small:pairs={discs},tokenizer=bytes,size=24,epochs=4")
    c.unlock()
    c.run, c.eval.report, c.optim.lr = str(tmp_path / "run"), False, 2e-3
    trainer.run(c)
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert results["retrieval/holdout/images"] >= 8
    level = results["retrieval/holdout/chance/image_to_text/r5"]
    assert 0 <= results["retrieval/holdout/image_to_text/r5"] <= 100 and 0 < level <= 100
    assert "zeroshot/holdout/top1" in results
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("retrieval/holdout/image_to_text/r1" in line for line in metrics) > 2  # on the way
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < losses[0]

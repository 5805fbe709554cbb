import dataclasses
import json
import math
import re
import shutil
import subprocess
import time
from html import unescape
from html.parser import HTMLParser

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.special
import scipy.stats

from tests import tiny
from tests.util import two_towers
from xclip_jax import report
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.errors import UserError
from xclip_jax.evaluators import flat_names, summary
from xclip_jax.evaluators.zeroshot import ZeroShotSet
from xclip_jax.losses import noncontrastive
from xclip_jax.models.layers import stack_blocks
from xclip_jax.parallel.mesh import AXES, make_mesh
from xclip_jax.report import __main__ as command
from xclip_jax.report import attention, chance, charts, examples, html, record, selection
from xclip_jax.train import trainer
from xclip_jax.train.checkpoint import Checkpointer

HOSTILE = "<script>alert(1)</script>\" onload='alert(2)' &amp; <b>"
SECTIONS = ("names", "search", "clusters", "attention", "confusion", "results", "curves", "health", "run")


class Page(HTMLParser):
    """Reads a page and notes its tags, ids, what it loads and its text; unbalanced tags are an error."""

    VOID = frozenset(("meta", "input", "img", "br", "wbr", "line", "rect", "polyline", "link"))

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.open, self.ids, self.loads, self.attributes = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            self.attributes.append(key)
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "srcset", "action", "data", "poster"):
                self.loads.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text.append(data)


def check(text):
    """What holds for every page; returns it read."""
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)) and set(SECTIONS) <= set(page.ids)
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)
    assert {load for load in page.loads if load.startswith("#")} <= {f"#{i}" for i in page.ids}
    assert not re.search(r"url\((?!data:image/webp;base64,)|@import|\bfetch\(|XMLHttpRequest|import\(", text)
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert not [a for a in page.attributes if a.startswith("on")]
    assert "default-src 'none'" in text and len(text) < 10e6
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of xCLIP on pairs and a set whose words are hostile, with its report."""
    root = tmp_path_factory.mktemp("report")
    pairs, rng = tiny.folder(root / "pairs"), np.random.default_rng(0)
    for i in range(0, 40, 2):
        (pairs / f"{i:03d}.txt").write_text(HOSTILE)
    for label in ("cat", "<img src=x onerror=alert(3)>"):
        (root / "set" / label).mkdir(parents=True)
        for i in range(10):
            image = PIL.Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
            image.save(root / "set" / label / f"{i}.png")
    changes = {"data__sources": (f"folder:{pairs}",), "mesh__fsdp": 2, "eval__every": 2, "eval__report": True}
    changes |= {"eval__sets": (f"folder:{root / 'set'}",), "log__collapse_warmup_steps": 1}
    trainer.run(tiny.config(run=root / "run", steps=4, **changes), [report.callback()])
    return root


def test_the_page_of_a_run_needs_nothing_else_and_escapes_everything(run):
    text = (run / "run" / html.NAME).read_text()
    page = check(text)
    assert "alert" not in re.sub(r"&lt;.*?&gt;|alert\(2\)", "", text)
    words = " ".join(page.text)
    for said in ("What xCLIP learned", "4 steps of 16 image-text pairs", "top-1", "Mutual information", "taken for"):
        assert said in words, said
    assert "onerror=alert(3)" in words  # shown as text
    assert (run / "run" / "picture.png").exists()


def test_where_a_run_names_no_set_its_own_pairs_are_shown(run, tmp_path):
    shutil.copytree(run / "run", tmp_path / "run")
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    written["config"]["eval"] |= {"sets": [], "final_sets": []}
    (tmp_path / "run" / "config.json").write_text(json.dumps(written))
    command.main([str(tmp_path / "run"), "--output", str(tmp_path / "x.html"), "--seed", "3"])
    page = check((tmp_path / "x.html").read_text())
    words = " ".join(page.text)
    assert "training pairs, which the model has seen" in words and "drawn by seed" in words
    assert HOSTILE in words
    assert "the run names none. Name some in eval.final_sets" in words  # of names for images


def test_a_run_in_progress(run, tmp_path):
    """Without a checkpoint there are curves; a half-written line and a half-written checkpoint are left alone."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(run / "run" / "config.json", folder)
    lines = (run / "run" / "metrics.jsonl").read_text().splitlines()[:2]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo')
    half = folder / "checkpoints" / "3.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    command.main([str(folder)])
    assert half.exists()
    page = check((folder / html.NAME).read_text())
    words = " ".join(page.text)
    assert "What xCLIP has learned so far" in words and "holds no checkpoint" in words
    assert "2 of 4 steps" in words and "The last evaluation has not been made yet" in words
    (folder / "metrics.jsonl").unlink()
    shutil.rmtree(folder / "checkpoints")
    command.main([str(folder)])
    assert "No step is logged yet" in (folder / html.NAME).read_text()


def test_a_reader_leaves_what_a_writer_has_begun(tmp_path):
    half = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.latest() is None
        time.sleep(0.3)  # Orbax cleans up behind our back
    assert half.exists()
    with Checkpointer(tmp_path):
        until = time.monotonic() + 20
        while half.exists() and time.monotonic() < until:
            time.sleep(0.05)
    assert not half.exists()


def test_a_report_that_fails_loses_nothing(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run / "run", tmp_path / "run")
    expected = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    (tmp_path / "run" / "results.json").unlink()
    config = tiny.config(run=tmp_path / "run", steps=4)
    config.update(_tuples(json.loads((tmp_path / "run" / "config.json").read_text())["config"]))
    config.run = str(tmp_path / "run")
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    written["config"]["run"] = config.run
    (tmp_path / "run" / "config.json").write_text(json.dumps(written))

    def broken(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(html, "make", broken)
    assert trainer.run(config, [report.callback()]) == pytest.approx(expected, abs=1e-4)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["results"] == pytest.approx(expected, abs=1e-4)
    assert "no report: RuntimeError: broken; python -m xclip_jax.report" in capsys.readouterr().out


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{}/none"], "is no run's folder"),
        (["{}/run", "--sets", "imagenett"], "set 'imagenett'; did you mean 'imagenet'"),
        (["{}/run", "--step", "9"], "no checkpoint of step 9"),
        (["{}/run", "--stepp", "9"], "unrecognized arguments"),
        (["{}/run", "--output", "{}/none/x.html"], "none' does not exist; make it first"),
        (["{}/run", "--output", "{}"], "is a folder; name a file in it"),
        ([], "required: RUN"),
    ],
)
def test_bad_input_is_one_sentence(flags, message, run, monkeypatch):
    monkeypatch.setattr(html, "make", lambda *_, **__: pytest.fail("looked at the model first"))
    with pytest.raises(SystemExit) as stopped:
        command.main([flag.format(run) for flag in flags])
    assert message in str(stopped.value)
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)


# A run as files alone.


def written(folder, objective, rows, **changes):
    folder.mkdir()
    config = {"config": tiny.config(objective, run=folder, **changes).to_dict(), "environment": {"python": "3"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return record.read(folder)


def test_a_run_without_clusters(tmp_path):
    rows = [{"step": s, "loss": 2 / s, "clip/loss": 2 / s, "clip/ln_b": 2.77, "rank/img": 3.0} for s in (1, 2)]
    text = html.render(written(tmp_path / "run", "clip", rows), examples.Examples(missing=["nothing"]))
    words = " ".join(check(text).text)
    assert "this objective trains no cluster heads" in words and "The alarms are of cluster heads" in words
    assert "ln b" in words and "Mutual information" not in words


def collapsed(kind):
    """Metrics of `nclip` with one of its failures, or none."""
    row = {"nclip/ln_b": math.log(16), "nclip/ln_k": math.log(24), "nclip/agreement": 0.9, "nclip/loss": 0.0}
    for m in ("img", "txt"):
        entropy, marginal = {"flat": (2.7, 2.75), "few clusters": (0.1, 0.5)}.get(kind, (0.1, 2.7))
        row |= {f"nclip/entropy_{m}": entropy, f"nclip/marginal_entropy_{m}": marginal, f"nclip/clusters_{m}": 14.0}
        row[f"nclip/mutual_information_{m}"] = marginal - entropy
    return row | ({"nclip/agreement": 0.05} if kind == "disagreement" else {})


@pytest.mark.parametrize("kind", ["", "flat", "few clusters", "disagreement"])
def test_each_failure_has_its_light_and_its_remedy(kind, tmp_path):
    rows = [{"step": s, "loss": 0.0} | collapsed(kind if s == 2 else "") for s in (1, 2)]
    found = written(tmp_path / "run", "nclip", rows, log__collapse_warmup_steps=1)
    text = html.render(found, examples.Examples())
    lights = re.findall(r'<article class="card light (\w*)"><h3>([^<]+)<span>([^<]+)', text)
    expected = {
        name: ("alarm", "alarm") if name == kind else ("", "healthy")
        for name in ("flat", "few clusters", "disagreement")
    }
    assert {name.lower(): (state, said) for state, name, said in lights} == expected
    measures = {key.removeprefix("nclip/"): value for key, value in rows[-1].items()}
    warnings = noncontrastive.diagnose(measures, k=24, b=16)
    assert [warning.split(":")[0] for warning in warnings] == ([kind] if kind else [])
    assert all(warning.partition(": ")[2] in " ".join(Page(text).text) for warning in warnings)
    early = html.render(
        dataclasses.replace(found, config=found.config | {"log": {"collapse_warmup_steps": 9}}), examples.Examples()
    )
    assert early.count("too early") == 3 and "healthy" not in early.partition("<main")[2].partition("<script")[0]


@pytest.mark.parametrize(("k", "b"), [(1, 16), (24, 1), (1, 1)])
def test_one_cluster_or_a_batch_of_one_pair_cannot_be_judged(k, b, tmp_path):
    """ln 1 = 0 is all the information that there could be."""
    row = dict.fromkeys(collapsed(""), 0.0) | {"nclip/agreement": 1.0, "nclip/ln_b": math.log(b)}
    row |= {"step": 1, "loss": 0.0, "nclip/ln_k": math.log(k), "nclip/clusters_img": 1.0, "nclip/clusters_txt": 1.0}
    changes = {"log__collapse_warmup_steps": 1, "data__batch": b, "model__cluster_head__clusters": k}
    text = html.render(written(tmp_path / "run", "nclip", [row], **changes), examples.Examples())
    check(text)
    assert text.count("not judged") == 3 and text.count("cannot collapse") == 3 and "0.00 possible" in text
    assert "nan" not in text.partition("<main")[2].partition("<script")[0]


def test_the_evaluation_stands_in_for_results(tmp_path):
    found = written(tmp_path / "run", "clip", [])
    assert found.results == [] and found.steps == 0
    result = {"name": "zeroshot/x", "metrics": {"top1": 12.5, "top5": 50.0, "n": 8, "ways": 10}}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"results": [result]}))
    words = " ".join(Page(html.render(record.read(tmp_path / "run"), examples.Examples())).text)
    assert "From evaluation.json" in words and "12.5" in words and "(10.0)" in words


def test_results_are_told_from_chance(tmp_path):
    """Of 10 names: 11 of 100 right are within the interval, 5.6 to 18.8 %, of 20 chance is below, of 1 above."""
    results = {}
    for name, top1 in (("a<b", 20.0), ("b", 11.0), ("c", 1.0)):
        results |= {f"zeroshot/{name}/top1": top1, f"zeroshot/{name}/top5": 50.0}
        results |= {f"zeroshot/{name}/n": 100.0, f"zeroshot/{name}/ways": 10.0}
    results |= {f"retrieval/r/{way}/r{k}": 9.0 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    results |= {"retrieval/r/images": 100.0, "retrieval/r/captions": 500.0}
    results |= {"visual/p/linear/top1": 55.0, "visual/p/n": 100.0, "visual/p/ways": 3.0, "visual/p/majority": 50.0}
    results |= {"textual/s/spearman_all": 50.0, "textual/s/spearman_mean": 50.0, "textual/s/pairs": 100.0}
    results = flat_names.read(results)
    judged = chance.verdicts(results)
    assert judged == {
        ("a<b", "top1"): "above chance", ("b", "top1"): "not distinguishable from chance",
        ("c", "top1"): "below chance", ("r", "image_to_text/r1"): "above chance",
        ("p", "linear/top1"): "not distinguishable from chance",
    }  # fmt: skip
    found = written(tmp_path / "run", "clip", [{"step": 1, "loss": 1.0, "clip/loss": 1.0}])
    words = " ".join(check(html.render(dataclasses.replace(found, results=results), examples.Examples())).text)
    assert "above chance (10.0\u00a0%)" in words  # the tile of zero-shot classification
    assert "Not distinguishable from chance: b (top-1), p (linear probe, top-1). By 95% binomial" in words


@pytest.mark.parametrize(
    ("n", "right", "low", "high"), [(40, 23, 0.4089, 0.7296), (100, 11, 0.0562, 0.1883), (8, 0, 0.0, 0.3694)]
)
def test_verdicts_change_where_the_exact_interval_ends(n, right, low, high):
    """Ends by the beta distribution's quantiles, of which chance is a hair to either side."""
    ends = scipy.stats.beta.ppf([0.025, 0.975], [max(right, 1e-12), right + 1], [n - right + 1, n - right])
    assert ends == pytest.approx([low, high], abs=1e-4)
    within = "not distinguishable from chance"
    for share, verdict in ((low - 1e-3, "above chance"), (low + 1e-3, within), (high - 1e-3, within),
                           (high + 1e-3, "below chance")):  # fmt: skip
        if share > 0:
            results = {"visual/x/linear/top1": 100 * right / n, "visual/x/n": float(n), "visual/x/ways": 2.0}
            results["visual/x/majority"] = 100 * share
            assert chance.verdicts(flat_names.read(results)) == {("x", "linear/top1"): verdict}


# Parts.


def test_tables_have_a_cell_for_each_column_and_say_what_their_text_says():
    results = {"zeroshot/a/top1": 50.0, "zeroshot/a/top5": 75.0, "zeroshot/a/n": 8.0, "zeroshot/a/ways": 10.0}
    results |= {"zeroshot/a/cosine/top1": 40.0, "zeroshot/a/cosine/top5": 60.0}
    results |= {f"retrieval/r/{way}/r{k}": 9.0 for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    results |= {"retrieval/r/images": 5.0, "retrieval/r/captions": 20.0}
    results = flat_names.read(results)
    found = summary.tables(results)
    assert [t.title.split(",")[0] for t in found] == ["zero-shot classification", "retrieval", "the families"]
    assert all(len(cells) == len(t.columns) for t in found for _, cells in t.rows)
    assert found[0].rows[0] == ("a", ["10", "8", "50.0", "(10.0)", "75.0", "(50.0)"])
    assert [row[0] for row in found[2].rows] == ["zero-shot classification", "retrieval"]
    text = summary.render(results)
    assert all(cell in text for t in found for _, cells in t.rows for cell in cells)


def test_numbers_and_ticks():
    values = (0, 12, 0.5, 7.5, 103.25, 1234.5, 1e-5, 0.00075, 0.001, -0.0312, math.nan)
    assert list(map(charts.number, values)) == [
        "0",
        "12",
        "0.5",
        "7.5",
        "103.2",
        "1,234",
        "1e-5",
        "7.5e-4",
        "0.001",
        "-0.0312",
        "not a number",
    ]
    assert charts.ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert charts.ticks(-0.3, 0.35, 5) == pytest.approx([-0.2, 0, 0.2])
    for low, high in ((1, 2), (0.001, 0.0013), (-7, 1e6)):
        found = charts.ticks(low, high, 5)
        assert 2 <= len(found) <= 6 and low <= min(found) and max(found) <= high * (1 + 1e-9)


def test_a_chart_keeps_to_what_is_finite_and_short():
    steps = range(5000)
    line = charts.Line("a<b", steps, [math.nan if s % 7 == 0 else s for s in steps], 0)
    text = charts.chart("T", [line], [charts.Level("alarm", -100.0, below=True)], unit="nats")
    Page(text)
    data = json.loads(re.search(r'data-chart="([^"]+)"', text)[1].replace("&quot;", '"').replace("&lt;", "<"))
    (drawn,) = data["lines"]
    assert drawn["name"] == "a<b" and len(drawn["x"]) == charts.POINTS
    assert drawn["y"] == pytest.approx(drawn["x"], abs=1) and "a&lt;b" in text
    points = np.array([p.split(",") for p in re.search(r'points="([^"]+)"', text)[1].split()], float)
    assert points[0, 0] == 0 and points[-1, 0] == 1000 and (np.diff(points[:, 1]) < 0).all()
    assert charts.chart("T", [charts.Line("none", [1], [math.nan], 0)]) == ""


def test_the_confusion_matrix_counts_and_the_seed_decides_among_equals():
    images = [np.full((2, 2, 3), i, np.uint8) for i in range(6)]
    data = ZeroShotSet("x", images, np.array([0, 0, 1, 2, 2, 2]), [["a"], ["b"], ["c"]], coarse=["p", "p", "q"])
    answers = np.array([1, 1, 0, 2, 0, 0])
    found = examples._confusion("x", data, data, np.eye(3)[answers], np.random.default_rng(0))
    assert found.classes == ["p", "q"] and found.counts.tolist() == [[3, 0], [2, 1]]
    assert [(m.name, m.taken_for, m.count) for m in found.mistakes[:2]] in (
        [("a", "b", 2), ("c", "a", 2)],
        [("c", "a", 2), ("a", "b", 2)],
    )
    assert found.mistakes[2].taken_for == "a" and found.mistakes[2].images[0][0, 0, 0] == 2
    fine = examples._confusion(
        "x", dataclasses.replace(data, coarse=()), data, np.eye(3)[answers], np.random.default_rng(0)
    )
    assert fine.classes == ["a", "b", "c"] and fine.counts[2].tolist() == [2, 0, 1]


def test_what_is_looked_at(monkeypatch):
    asked = []

    def load(spec, size, data_dir):
        asked.append(spec)
        if spec == "imagenet":
            raise UserError("imagenet is not prepared.")
        images = [np.zeros((4, 4, 3), np.uint8)] * 3
        if "retrieval" in spec:
            return selection.RetrievalSet(spec, images, [["a"]] * 3)
        return ZeroShotSet(spec, images, np.arange(3), [[f"{c} {i}" for i in range(4000)] for c in "abc"])

    monkeypatch.setattr(selection.registry, "load", load)
    specs = ["imagenet", "probe/cifar10", "folder:x", "sts12@y", "coco_retrieval"]
    found = selection.select(specs, Preprocessing(4), None, None, 0)
    assert set(asked) == {"imagenet", "folder:x", "coco_retrieval"} and found.missing == ["imagenet is not prepared."]
    assert [panel.title for panel, *_ in found.zeroshot] == ["folder:x"] and found.retrieval[0].name == "coco_retrieval"
    assert sum(map(len, found.zeroshot[0][1].prompts)) == selection.PROMPTS and not found.credits
    asked.clear()
    found = selection.select(
        ["emoji/test_line", "emoji/test_probe", "emoji/test_concepts", "emoji/test_rendering_rest"],
        Preprocessing(4),
        None,
        None,
        0,
    )
    assert [panel.spec for panel, *_ in found.zeroshot] == ["emoji/test_concepts", "emoji/test_line"] and found.credits
    assert "emoji/test_rendering_rest" not in asked


# Attention.


def softmax(query, key):
    """Per head: (b, n, heads, kv), (b, m, heads, kv) -> (b, heads, n, m)."""
    return scipy.special.softmax(np.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5, axis=-1)


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
def test_attention_is_that_of_the_tower(pool):
    """Queries and keys as captured, applied to the values, give what the tower's own attention gives."""
    tower = {"width": 16, "depth": 2, "heads": 2}
    model = two_towers(
        img={"image_size": 8, "patch": 4, "pool": pool, **tower},
        txt={"vocab": 8, "eot_id": 7, "context_length": 4, **tower},
        embed=8,
    )
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    statistics = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    pixels = (images / 255 - 0.5).astype(np.float32) / 0.25
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), pixels, jnp.zeros((3, 4), jnp.int32)))
    run = jax.jit(
        lambda v: model.apply(v, pixels, method="encode_image", capture_intermediates=True, mutable=["intermediates"])[
            1
        ]
    )
    found = jax.device_get(run(variables))["intermediates"]["img"]
    rollout = np.eye(4 + (pool == "cls"))[None]
    for i in range(2):
        layer = found["transformer"][f"block_{i}"]["attention"]
        query, key, value = np.moveaxis(layer["qkv"]["__call__"][0], 2, 0)
        weights = softmax(query, key)
        out = jax.device_get(variables["params"]["img"]["transformer"][f"block_{i}"]["attention"]["out"])
        y = np.einsum("bhnm,bmhd,hdo->bno", weights, value, out["kernel"]) + out["bias"]
        theirs = layer["__call__"][0]
        assert theirs.shape[1] == (1 if pool == "cls" and i == 1 else y.shape[1])  # no other token is read
        np.testing.assert_allclose(y[:, : theirs.shape[1]], theirs, atol=1e-5)
        rollout = (weights.mean(axis=1) + np.eye(rollout.shape[1])) / 2 @ rollout
    last = weights.mean(axis=1)
    if pool == "map":
        last = softmax(found["pool_map"]["query"]["__call__"][0], found["pool_map"]["kv"]["__call__"][0][:, :, 0])
        last = last.mean(axis=1)
        rollout = last @ rollout
    expected = [{"cls": x[:, 0, 1:], "mean": x.mean(axis=1), "map": x[:, 0]}[pool] for x in (last, rollout)]

    mesh = make_mesh(dict(zip(AXES, (-1, 1, 1), strict=True)))
    if pool == "map":  # stacked blocks are the same tower
        model = model.clone(img=dataclasses.replace(model.img, scan=True, remat="full"))
        blocks = stack_blocks(variables["params"]["img"]["transformer"], 2)
        img = {**variables["params"]["img"], "transformer": blocks}
        variables = {"params": {**variables["params"], "img": img}}
    maps = attention.attention(model, variables, list(images), statistics, mesh, n=2, seed=5)
    assert len(set(maps.picked)) == 2
    for mine, theirs in zip((maps.last, maps.rollout), expected, strict=True):
        theirs = theirs[maps.picked] / theirs[maps.picked].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(mine, theirs.reshape(2, 2, 2), atol=1e-5)


# The page in a browser.

_WATCH = """<script>
const errors = [], log = console.error;
console.error = (...a) => { errors.push(a.join(" ")); log(...a); };
addEventListener("error", e => errors.push(e.message || String(e.target && e.target.tagName)), true);
addEventListener("securitypolicyviolation", e => errors.push(e.blockedURI));
addEventListener("load", () => setTimeout(() => {
  const found = { errors, width: document.documentElement.scrollWidth, inner: innerWidth };
  const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 1, clientY: box.top + 9, bubbles: true }));
  found.tip = document.querySelector(".tip").textContent;
  plot.dispatchEvent(new PointerEvent("pointerleave"));
  found.left = document.querySelectorAll(".tip").length;
  const figure = document.querySelector(".chart");
  figure.focus();
  figure.dispatchEvent(new KeyboardEvent("keydown", { key: "Home", bubbles: true, cancelable: true }));
  found.first = document.querySelector(".tip div").textContent;
  const find = document.getElementById("find"), card = document.querySelector("[data-words]");
  find.value = card.dataset.words.split(" ").pop();
  find.dispatchEvent(new Event("input"));
  found.cards = [...document.querySelectorAll("[data-words]")].filter(c => !c.hidden).map(c => c.dataset.words);
  found.asked = find.value;
  find.value = "zzz";
  find.dispatchEvent(new Event("input"));
  found.none = document.querySelectorAll("[data-words]:not([hidden])").length;
  parent.postMessage(JSON.stringify(found), "*");
}, 100));</script>"""


@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("google-chrome")), reason="no browser here")
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser_nothing_fails_and_nothing_sticks_out(width, run, tmp_path):
    text = (run / "run" / html.NAME).read_text()
    (tmp_path / "page.html").write_text(text.replace("<head>", f"<head>{_WATCH}", 1))
    # Chromium's own windows are never narrower than 500 pixels; a frame is.
    (tmp_path / "frame.html").write_text(
        '<body><pre id="out"></pre><script>onmessage = e => { document.getElementById("out").textContent = e.data; };'
        f'</script><iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe></body>'
    )
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=4000 --window-size=1600,1000 --dump-dom"
    )
    line = [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'frame.html'}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    out = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.DOTALL)
    assert out, done.stderr[-2000:]
    found = json.loads(unescape(out[1]))
    assert found["errors"] == []
    assert found["width"] <= found["inner"] == width
    assert found["tip"].startswith("step 4") and found["left"] == 0 and found["first"] == "step 1"
    assert found["cards"] and all(found["asked"] in words for words in found["cards"]) and found["none"] == 0

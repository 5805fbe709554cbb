import dataclasses
import types

import chex
import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.stats

from examples import superclip
from studies import records
from studies.photographs import claims, command, corpus, evaluators, page, sets, spaces, stages, terms
from studies.runner import ROOT
from xclip_jax.core.errors import UserError
from xclip_jax.data.base import SourceOptions
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.results import Result
from xclip_jax.models.heads import ClusterHeadConfig
from xclip_jax.models.two_towers import ModelConfig
from xclip_jax.objectives.nclip import Nclip

TIMED = ["final_xclip", *(f"control_{name}" for name in spaces.TIMED)]


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder of files like the study's: 30 kinds of 100 photographs, and two further ones."""
    known = [f"Kind {i}" for i in range(30)]
    splits = {"train": known * 100, "validation": known * 4, "test": known * 6, "test_unseen": ["New", "Newer"] * 30}
    image = cv2.imencode(".png", np.arange(144, dtype=np.uint8).reshape(8, 6, 3))[1].tobytes()
    for split, kinds in splits.items():
        n = len(kinds)
        columns = {
            "id": list(range(n)),
            corpus.TITLE: [f"Brand {(i // 30 * 7 + i) % 25} Men Blue {kind}" for i, kind in enumerate(kinds)],
            "gender": ["Men", "Girls"] * (n // 2),
            corpus.KIND_COLUMN: kinds,
            "baseColour": ["Navy Blue", "NA"] * (n // 2),
            "season": ["Summer", "Winter"] * (n // 2),
            "image": [{"bytes": image, "path": None}] * n,
        }
        path = tmp_path / corpus.FILES[split].replace("*", "0")
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    monkeypatch.setattr(corpus, "ROWS", {split: len(kinds) for split, kinds in splits.items()})
    monkeypatch.setattr(sets, "PROBED", 400)
    for cached in (corpus.table, corpus.rows, corpus.held_kinds):
        cached.cache_clear()
    return str(tmp_path)


def test_splits_and_captions(shop):
    held = corpus.held_kinds(shop)
    choice, unseen = (corpus.rows(shop, split) for split in ("choice", "validation_unseen"))
    assert len(held) == corpus.HELD_KINDS and {row[corpus.KIND_COLUMN] for row in unseen} == set(held)
    assert not {row[corpus.KIND_COLUMN] for row in choice} & set(held)
    assert sorted(row["id"] for row in (*choice, *unseen)) == list(range(3000))
    assert corpus.captions(shop, "test", "tight")[:2] == ["men's navy blue kind 0", "girls' kind 1"]
    half = corpus.captions(shop, "train", "half")
    assert 0.45 < sum(caption.startswith("Brand") for caption in half) / len(half) < 0.55
    tight, loose = (corpus.PhotographSplits.open(f"choice/{x}", SourceOptions(dir=shop)) for x in ("tight", "loose"))
    assert tight[0]["text"] == [corpus.captions(shop, "choice", "tight")[0]]
    assert tight.fingerprint() != loose.fingerprint()
    with pytest.raises(UserError, match="SPLIT/CAPTIONS"):
        corpus.PhotographSplits.open("choice/long", SourceOptions(dir=shop))
    with pytest.raises(UserError, match="PHOTOGRAPHS"):
        corpus.folder(shop + "/nowhere")


def test_sets(shop):
    made = [
        sets.PhotographSets.load(x, Preprocessing(8), DataConfig(dir=shop), None) for x in sets.PhotographSets.names
    ]
    assert all((x.card.role == "validation") == ("/validation_" in x.name) for x in made)
    (titled,) = (x for x in made if x.name.endswith("/validation_unseen_titles"))
    prompts = {prompt for of_class in titled.prompts for prompt in of_class}
    assert len(prompts) == sets.TITLES * len(titled.prompts)
    rows = corpus.rows(shop, "validation_unseen")
    assert len(titled.images) == sum(row[corpus.TITLE] not in prompts for row in rows) > 0


def test_geometric_mean_rank():
    groups = np.array([0, 1, 1, 2])
    data = evaluators.RankedSet("x", [None] * 4, groups, [["a"], ["b"], ["c"]], together=groups)
    # Ranks from 0; the third image has no valid ranking.
    (result,) = evaluators.Ranked(None, data).results_of_ranks("", np.array([0, 1, 3, 2]))
    assert result.key == "rank_gmean" and result.unit == "rank" and result.items.groups is groups
    assert result.value == pytest.approx((1 * 2 * 3 * 3) ** (1 / 4)) and result.chance == pytest.approx(6 ** (1 / 3))


def test_geometry():
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 5, n) for n in (200, 50))
    known, new = (rng.integers(0, 40, n) for n in (200, 50))  # clusters
    noise = rng.normal(0, 0.01, (200, 5))
    pairs = ((train, known), (test, new))
    sides = [{"features": np.eye(5)[x] + noise[: len(x)], "cluster_logits": np.eye(40)[c]} for x, c in pairs]
    data = evaluators.GeometrySet("x", sides[0], (), sides[1], {"kind": (train, (), test)})
    encoder = types.SimpleNamespace(similarities=(), images=lambda variables, images, names: images)
    values = {r.key: r.value for r in evaluators.Geometry(encoder, data).measure(None)}
    named = [scipy.stats.mode(train[known == cluster]).mode for cluster in new]
    assert values["clusters/kind"] == pytest.approx(100 * np.mean(named == test)) and values["kmeans/kind"] == 100
    # Orthogonal columns of one length have an even spectrum: the rank is their number.
    assert evaluators.effective_rank(np.concatenate([np.eye(6), -np.eye(6)])) == pytest.approx(6)


def test_the_second_head_against_its_definition():
    x, y = np.random.default_rng(0).normal(size=(2, 7, 4))
    params = {"clusters": {"kernel": np.eye(4), "bias": np.zeros(4)}}
    u, v = (terms.UnitHead(4, layers=0).apply({"params": params}, z) for z in (x, y))
    loss, _, _ = terms.SecondHead()({"second_img": u, "second_txt": v, "second_scale": 5.0}, None, {}, {})
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    s = np.exp(5 * a @ b.T)
    by_hand = [-np.log(s[i, i] ** 2 / s[i].sum() / s[:, i].sum()) / 2 for i in range(7)]
    assert float(loss) == pytest.approx(np.mean(by_hand), abs=1e-5)


def test_heads_that_teach_the_towers_nothing():
    """The loss of one is 0, that of the other has nCLIP's gradient for its parameters, and none for the features."""
    h = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 4)))
    model = ModelConfig(cluster_head=ClusterHeadConfig(clusters=5, layers=0))
    params = {"clusters": {"kernel": jnp.eye(4, 5), "bias": jnp.zeros(5)}}

    def gradients(term):
        heads = term.heads(model, 0)

        def loss(params, h):
            towers = zip(("img", "txt"), heads.values(), h, strict=True)
            out = {f"s_{tower}": head.module.apply({"params": params}, x) for tower, head, x in towers}
            return term(out, None, {}, {})[0]

        return jax.jit(jax.grad(loss, (0, 1)))(params, h)

    expected, of_features = gradients(Nclip())
    chex.assert_trees_all_close(gradients(terms.DetachedHead()), (expected, 0 * h))
    chex.assert_trees_all_equal(gradients(terms.FixedHead()), jax.tree.map(jnp.zeros_like, (expected, h)))
    assert np.abs(of_features).max() > 1e-3


def test_tokens_that_are_not_common_share_a_class():
    term = terms.CommonTokens()
    start, *common = terms.common_tokens().tolist()
    text = np.array([[start, common[3], common[5], 90, 49_407], [start, common[7], 49_407, 0, 0]])
    classes = np.array([[0, 4, 6, 0, 0], [0, 8, 0, 0, 0]])
    end = np.array([5, 2])
    logits = np.random.default_rng(0).normal(size=(2, 1 + len(common)))
    state = term.initial_state(None, 50_000)
    loss, _, _ = term({"tokens": logits}, None, state, {"text": text, "text_end": end})
    assert float(loss) == float(superclip.classify(logits, classes, superclip.first_uses(classes, end), state)[0])


def finish(monkeypatch, settled, arms=("pilot", "search")):
    """Return the study with finished `arms`; pilots settle from a number of steps on, and candidate 3 is the best."""

    def finished(self, name):
        if not name.startswith(arms) or self.study.arm(name) is None:
            return {}
        best = float(name.endswith("_3"))
        results = [
            *(Result(of_naming, "zeroshot", "rank_gmean", 3 - best) for of_naming in stages.VALIDATION[:2]),
            *(Result(stages.VALIDATION[2], "retrieval", metric, best) for metric in claims.BOTH_WAYS),
            Result(stages.VALIDATION[3], "visual", "linear/top1", best, task="kind"),
        ]
        steps = self.study.arm(name).changes["steps"]
        moved = 0.5 if steps >= settled else 2.0
        points = ((steps * 3 // 4, 50.0), (steps, 50.0 + moved))
        curve = [{"step": step, "photographs/validation_known top1": value} for step, value in points]
        curve.append({"step": steps, "photographs/validation_probe top1": 80.0})  # at the end alone
        record = records.RunRecord(name, 0, {"steps": steps}, "", {}, results, evaluations=curve)
        return dict.fromkeys(self.study.arm(name).seeds, record)

    monkeypatch.setattr(stages.Photographs, "finished", finished)
    return stages.Photographs({}, dict.fromkeys(TIMED, 1.25))


@pytest.mark.parametrize(("settled", "length"), [(800, 800), (9999, stages.FALLBACK)])
def test_stages_follow_from_records(monkeypatch, settled, length):
    study = finish(monkeypatch, settled)
    arms = {arm.name: arm for arm in study.study.arms}
    assert study.length == length and not study.to_measure and sum("search2" in name for name in arms) == 8
    assert study.chosen == {team: candidates[2] for team, candidates in spaces.TEAMS.items()} == study.by_own
    steps = {name: arm.changes["steps"] for name, arm in arms.items()}
    assert steps["final_xclip"] == steps["control_detached_head"] == round(length / 1.25)
    assert steps["batch_64_clip"] == 4 * length
    for part in (part for claim in claims.CLAIMS for part in claim.parts):
        assert {arm for side in (part.plus, part.minus) for arm, _ in part.terms(side)} <= arms.keys()
    for name, arm in arms.items():  # every arm is a config of the package
        config = study.config(arm, 0)
        assert arm.tested == (not name.startswith(("defaults", "pilot", "search")))
        assert config.eval.every == (0 if name.startswith(("defaults_icons", "search")) else steps[name] // 8)
        assert any("/test_" in name for name in (*config.eval.sets, *config.eval.sets_at_end)) == arm.tested
        assert ("train/" in config.data.sources[0]) == arm.tested
    untimed = stages.Photographs({}, {})
    assert [arm.name for arm, _ in untimed.to_measure] == TIMED
    assert untimed.study.arm("final_clip") and not untimed.study.arm("final_xclip")


@pytest.mark.parametrize(("rank", "both"), [(2.0, True), (4.0, False)])
def test_validation_chooses_the_reading_of_two_heads(monkeypatch, rank, both):
    name = stages.VALIDATION[0]
    ranks = [Result(name, "zeroshot", "rank_gmean", 3.0), Result(name, "zeroshot", "rank_gmean", rank, score="both")]
    runs = [records.RunRecord("", seed, {}, "", {}, ranks) for seed in (0, 1)]
    assert stages.both_heads_are_better(runs) == both and not stages.both_heads_are_better([])
    assert not stages.both_heads_are_better([records.RunRecord("", 0, {}, "", {}, ranks[:1])])
    values = [stages.values_of(runs[0], own)[0] for own in (False, True)]
    np.testing.assert_allclose(np.exp(values), [1 / min(rank, 3), 1 / 3])

    lost = [dataclasses.replace(result, value=np.nan) for result in ranks]  # as of features that are not finite
    for results, value in ((lost, -np.inf), ([lost[0], ranks[1]], -np.log(rank))):
        assert stages.values_of(records.RunRecord("", 0, {}, "", {}, results))[0] == pytest.approx(value)

    study = stages.Photographs({}, {})
    study.both_heads = both
    of_set = study.study.measure("unseen").set
    own = Result(of_set, "zeroshot", "top1", 40.0, headline=True)
    two = [own, Result(of_set, "zeroshot", "top1", 50.0, score="both")]
    for results, value in ((two, 50.0 if both else 40.0), ([own], 40.0)):
        run = records.RunRecord("", 0, {}, "", {}, results)
        monkeypatch.setattr(study, "finished", lambda _, run=run: {0: run})
        assert study.values("", study.study.measure("unseen")) == {0: value}


def test_recorded_runs_are_of_declared_arms():
    study = command.declared(command.HOME)
    assert study.records and study.records.keys() <= {run.key for run in study.runs()}
    record = records.read((ROOT / "tests/studies/golden/record.jsonl").read_text())  # of e2fee370
    changes = spaces.changes_of("xclip", spaces.TEAMS["xclip"][2], 1280)
    arm = stages.arm_of("final_xclip", "", "xclip", changes, (3,), "split=train")
    assert (
        stages.Photographs({}, {}).run(arm, 3).key == record.key and record.value("photographs/test_unseen", "") == 50.0
    )


def test_the_page(tmp_path, monkeypatch):
    command.main(["--page", "--home", str(tmp_path), "--docs", str(tmp_path)])
    text = (tmp_path / "tables.md").read_text()
    assert "**39 runs are missing.**" in text and "Winner of xCLIP: open." in text and "Undecided" in text
    assert [path.name for path in tmp_path.iterdir()] == ["tables.md"]

    study = finish(monkeypatch, 9999, arms="pilot")
    assert "Steps of CLIP in finals: 1600; no pilot settles." in page.lines(study, {})
    pilot = dataclasses.replace(study.complete(study.study.arm("pilot_800"))[0], evaluations=())
    monkeypatch.setattr(study, "complete", lambda _: [pilot])
    assert any("no pilot settles, and that of 800 steps has no curve" in line for line in page.lines(study, {}))

    # With all runs; xCLIP and a default setting are a point ahead.
    study = finish(monkeypatch, 800, arms="")
    ahead = ("xclip", "0.004_0.1")
    monkeypatch.setattr(study, "values", lambda name, _: {i: i + name.endswith(ahead) for i in study.finished(name)})
    study.by_own["clip"] = {"lr": 0.5}
    lines = page.lines(study, page.charts_of(study))
    assert [line for line in lines if "alone" in line] == ["By the embeddings' similarity alone: rate 0.5."]
    assert "| photographs/validation_known top1 | +0.0 | +1.5 |" in lines  # after equal shares of the time
    assert {f"![{name}]({name}.svg)" for name in ("differences", "gains", "validation_known_top1")} <= set(lines)
    assert "Validation chose to read models with two heads by the embeddings' similarity." in lines
    assert any(line.startswith("| xCLIP | +1.0 [+1.0, +1.0] |") for line in lines)
    assert f"| 0.004_0 |{' 1.0 |' * 8}" in lines and f"| 0.004_0.1 |{' 0.0 |' * 8}" in lines
    verdicts = [line for line in lines if line in ("**Holds.**", "**Undecided.**")]
    assert verdicts == ["**Holds.**"] * 3 + ["**Undecided.**"] * 2

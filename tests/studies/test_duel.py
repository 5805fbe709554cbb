"""The duel: spaces of equal size, halving and choices on made-up records, costs, terms, and a tiny run to its end."""

import dataclasses
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from studies.declaration import Arm
from studies.duel import command, cost, glyphs, mechanism, page, spaces, stages, terms, wrong
from studies.runner import ROOT
from tests.helpers import tiny
from tests.studies import made_records, tiny_study
from xclip_jax.evaluators.results import VALIDATION, Provenance, Result
from xclip_jax.objectives import make_objective
from xclip_jax.objectives.nclip import Nclip
from xclip_jax.train import build, state

# --- spaces


def test_teams_have_equally_many_candidates_of_equal_length():
    assert spaces.FILE.read_text() == spaces.render()
    for team, space in spaces.SPACES.items():
        drawn = spaces.candidates(team)
        assert len(drawn) == spaces.CANDIDATES == len({json.dumps(settings) for settings in drawn})
        for name, values in space.items():
            counts = {value: sum(settings[name] == value for settings in drawn[1:]) for value in values}
            assert sum(counts.values()) == 23
            assert all(abs(n - 23 * values.count(value) / len(values)) < 1 for value, n in counts.items())
    assert set(spaces.SPACES["clip"]) < set(spaces.SPACES["xclip"])
    first, second, third = stages.RUNGS
    assert (first.kept, second.kept, third.kept) == (24, 8, 3)


def test_arms_under_wrong_captions_have_four_candidates_each():
    for arm, (own, values) in spaces.WRONG.items():
        tried = spaces.retuned(arm, 2.0)
        assert len({json.dumps(settings) for settings in tried}) == 4
        for name, choices in {
            "rate": [2 * rate for rate in spaces.RATES],
            "warmup": spaces.WARM_UPS,
            **({own: values} if own else {}),
        }.items():
            assert sorted(settings[name] for settings in tried) == sorted([*choices, *choices])


def test_the_settings_of_a_winner_are_among_those_that_are_retuned():
    duel = command.declared(command.HOME)
    for team, arm in (("clip", "smoothed"), ("clip", "siglip"), ("xclip", "xclip"), ("xclip", "nclip")):
        winner = spaces.candidates(team)[duel.winners[team]]
        tried = spaces.retuned(arm, winner["rate"])
        assert spaces.team_of(arm) == team and winner in [winner | settings for settings in tried]


def test_a_shuffled_target_has_no_gradient():
    settings = spaces.candidates("xclip")[0] | {"target": "joint"}
    assert spaces.xclip(settings, 9, "k256_h256", shuffled=True)["objective.nclip.target"] == "detach"
    assert spaces.xclip(settings, 9, "k256_h256")["objective.nclip.target"] == "joint"


# --- choices


def test_the_rule_is_the_mean_of_two_ranks():
    values = {"a": (3.0, 10.0), "b": (2.0, 30.0), "c": (1.0, 20.0), "d": (0.0, 0.0)}
    # Ranks at naming 1, 2, 3, 4; at the probe 3, 1, 2, 4.
    assert stages.by_mean_rank(values) == ["b", "a", "c", "d"]
    assert stages.by_mean_rank({"a": (-np.inf, -np.inf), "b": (0.0, 0.0)}) == ["b", "a"]
    assert stages.by_mean_rank({"a": (1.0, 2.0), "b": (2.0, 1.0)}) == ["b", "a"]  # naming decides
    assert stages.by_mean_rank({}) == []  # the page of a rung without a finished run


class Made:
    """Records and costs of a duel, made up: candidates whose number is in `good` are the better, the nearer to it."""

    def __init__(self):
        self.records, self.costs = {}, {}

    def duel(self):
        return stages.Duel(self.records, self.costs)

    def fill(self, duel, value):
        """Finish all declared runs: `value` is of an arm's name, more is better at both measures."""
        for arm in duel.arms:
            for seed in arm.seeds:
                run = duel._matrix.run(arm, seed)
                self.records.setdefault(run.key, self._record(run, value(arm.name)))

    @staticmethod
    def _record(run, value):
        made = made_records.record(run, value)
        role = Provenance(role=VALIDATION)
        ranks = [
            Result(stages.VALIDATION[0], "zeroshot", "rank_gmean", rank, unit="rank", protocol=role, score=score)
            for score, rank in (("", 150.0), ("both", 100 - value))
        ]
        return dataclasses.replace(made, results=[*made.results, *ranks], curve={"step": [1, 2], "loss": [5.0, 4.0]})


def number(name):
    return int(name.rpartition("_")[2]) if name.startswith("rung") else 0


@pytest.mark.long
def test_the_duel_declares_itself_stage_by_stage():
    made = Made()
    duel = made.duel()
    assert [arm.name for arm in duel.arms] == ["heads_k1024_h1024"]  # the others wait for their costs
    assert {arm.name for arm, _ in duel.to_measure} == {f"heads_{name}" for name in spaces.HEADS}
    assert "missing" in page.render(duel, page.snapshot_of(duel), [], {})

    # The best head that costs little enough, and the cheapest where none does.
    value = {"heads_k1024_h1024": 50, "heads_k1024_h256": 40, "heads_k256_h256": 30}
    dear = {f"heads_{name}": 1.05 for name in spaces.HEADS} | {"heads_k256_linear": 1.04}
    assert [arm.title for arm in stages.Duel({}, dear).arms] == ["k1024_h1024", "k256_linear"]
    made.costs = {f"heads_{name}": 1.02 for name in spaces.HEADS} | {"heads_k1024_h1024": 1.14, "heads_k256_h256": 1.1}
    made.fill(made.duel(), lambda name: value.get(name, 10))
    assert made.duel().head == "k1024_h256"
    assert stages.Duel(made.records, dear).head == "k256_linear"

    # Halving: the candidates next to 8 are kept.
    for rung, kept in ((1, 24), (2, 8), (3, 3)):
        duel = made.duel()
        for team in spaces.SPACES:
            arms = [arm for arm in duel.arms if arm.name.startswith(f"rung{rung}_{team}_")]
            assert len(arms) == kept and len({arm.changes["steps"] for arm in arms}) == 1
            if rung == 3:
                assert sorted(number(arm.name) for arm in arms) == [7, 8, 9]
        assert not [arm for arm in duel.arms if arm.name.startswith(f"rung{rung + 1}_")]
        made.fill(duel, lambda name: 50 - abs(number(name) - 8.1) if name.startswith("rung") else 1)
    duel = made.duel()
    assert duel.winners == {"clip": 7, "xclip": 7}

    # Costs decide the steps of the finals, and all of them are of one clock.
    assert "final_xclip" in {arm.name for arm, _ in duel.to_measure}
    assert {clock.name for _, clock in duel.to_measure} == {"final_clip"}
    made.costs |= {arm.name: 1.25 for arm, _ in duel.to_measure}
    duel = made.duel()
    steps = {arm.name: arm.changes["steps"] for arm in duel.arms}
    assert steps["final_clip"] == 4000 and steps["final_xclip"] == steps["final_shuffled"] == 3200
    # An xCLIP without a teacher is compared where the winner has one; what comes next does not wait for its cost.
    assert spaces.candidates("xclip")[7]["target"] != "ema" and "final_cheaper" not in steps
    other = command.declared(command.HOME)
    other.costs.pop("final_cheaper", None)
    waiting = stages.Duel(other.records, other.costs)
    assert "final_cheaper" in {arm.name for arm, _ in waiting.to_measure} and waiting.retuned
    known = stages.Duel(other.records, other.costs | {"final_cheaper": 1.005})
    cheaper = next(arm for arm in known.arms if arm.name == "final_cheaper")
    assert cheaper.changes["objective.nclip.target"] == "detach" and cheaper.changes["steps"] == 3980
    again = next(arm for arm in glyphs.study(known).arms if arm.name == "glyphs_cheaper")
    assert again.changes == cheaper.changes and again.recipe.endswith("objective=xclip")
    made.costs |= {arm.name: 1.25 for arm, _ in duel.to_measure}
    better = ("xclip", "clip", "nclip", "smoothed")
    for _ in range(4):
        made.fill(made.duel(), lambda name: 60.0 if name.partition("_")[2] in better else 40.0 + (name[-2:] == "_1"))
    duel = made.duel()
    check_all_is_declared(duel)
    # The clusters of all three seeds fall by 2 from one step to the next, and a fourth step is one seed's alone.
    areas = [
        {"arm": f"wrong25_{arm}", "seed": seed, "step": step, score: area - step / 375 + seed / 10}
        for arm, score, area in (
            ("xclip", "clusters", 65.13),
            ("cheaper", "clusters", 67.13),
            ("clip", "loss", 60.0),
            ("smoothed", "loss", 62.0),
        )
        for seed in (0, 1, 2)
        for step in (750, 1500)
    ]
    areas.append({"arm": "wrong25_xclip", "seed": 1, "step": 900, "clusters": 10.0})
    snapshot = page.snapshot_of(duel)
    drawn = wrong.own_charts(snapshot, areas)
    assert drawn.keys() == {"wrong25", "wrong50", "suspects25"} and "xCLIP by clusters" in drawn["suspects25"]
    # At 50 % CLIP need not be among the best.
    fewer = [arm for arm in duel.arms if arm.name != "wrong50_clip"]
    study = stages.study_of(fewer, measures=page.measures(), named=page.NAMED)
    rest = page.Chosen(stages.DuelMatrix(study, stages.load_config), duel.records)
    assert "difference from CLIP, tuned smoothing" in wrong.own_charts(rest, areas)["wrong50"]
    text = page.render(duel, snapshot, areas, drawn)
    assert "What would have changed" in text and "1. names better than CLIP | " in text
    assert "63.2 after 750 (3), 61.2 after 1500 (3) |" in text and "not decided yet" not in text
    assert "| xCLIP | CLIP, its loss | +5.1 [+5.1, +5.1] | +5.1 [+5.1, +5.1] |" in text and "4.500 |" in text
    assert "| xCLIP without a teacher | CLIP, its loss | +7.1 [+7.1, +7.1] |" in text
    assert "of CLIP with tuned smoothing.* **Shown**" in text and "**Open**" not in text
    assert [claim.text for claim in snapshot.study.claims[4:]] == [page._EACH_RIVAL, page._SMOOTHED, page._AT_HALF]
    left = [line for line in command.overview(duel, "").splitlines() if line.endswith(" runs")]
    assert left == ["glyphs_clip: 3 of 3 runs", "glyphs_xclip: 3 of 3 runs"]

    # At the end both winners are trained on the second corpus, with the settings of the finals.
    study, names = command._next(duel, "")
    assert names == ["glyphs_clip", "glyphs_xclip"] and command._next(duel, "final")[1] == []
    for arm in study.arms:
        final = next(each for each in duel.arms if each.name == arm.name.replace("glyphs", "final"))
        config = stages.DuelMatrix(study, stages.load_config).config(arm, 0, {})
        assert arm.changes == final.changes and config.model.txt.context_length == 24
        assert next(iter(config.eval.final_sets)) == "studies.glyphs.sets:GlyphSets/test_concepts"
    assert "| CLIP | 0 of 3" in text.partition("## A second corpus")[2]
    assert "wrong captions" not in command.overview(duel, "final")


def check_all_is_declared(duel):
    """Every stage has the runs that were announced, but for arms whose keys the package lacks."""
    lacks = {name.rpartition("_")[2] if name.startswith("final") else name.split("_")[1] for name in duel.impossible}
    assert lacks <= {"superclip", "distilled", "gce"}
    assert {arm.name for arm in duel.arms if arm.name.startswith("wrong50")} == {
        f"wrong50_{name}" for name in ("xclip", "clip", "nclip", "smoothed", "gce")
    }
    steps = {arm.name: arm.changes["steps"] for arm in duel.arms}
    smoothing = {arm.name: arm.changes["objective.clip.label_smoothing"] for arm in duel.arms}
    assert smoothing["wrong25_clip"] == 0 < smoothing["final_clip"] == smoothing["wrong25_oracle"]
    assert steps["wrong25_oracle"] == steps["wrong25_clip"] == 3000
    assert steps["wrong25_shuffled"] == steps["wrong25_xclip"] == 2400
    for stage, _, _ in duel.progress():
        arms = [arm for arm in duel.arms if arm.name.startswith(f"{stage.prefix}_")]
        each = {"tune25": 4, "wrong25": 5, "final": 5, "tune50": 4, "wrong50": 3}.get(stage.prefix, 0)
        absent = lacks - {"gce"} if stage.prefix == "final" else lacks
        cheaper = {"final": 5, "wrong25": 3, "wrong50": 3}.get(stage.prefix, 0)  # this winner has no teacher
        assert sum(len(arm.seeds) for arm in arms) == stage.runs - each * len(absent) - cheaper


def test_the_whole_costs_what_is_declared():
    hours = {stage.prefix: stage.hours(stage.runs) for stage in stages.stages()}
    assert hours["final"] == pytest.approx(40 * (4000 * 0.35 + 75) / 3600)
    assert 30 < sum(hours.values()) < 48


def test_naming_and_rank_are_read_by_the_similarity_that_names_best_on_validation():
    snapshot = page.snapshot_of(command.declared(command.HOME))
    for arm, similarity in (("final_xclip", "both/"), ("final_clip", "")):
        for name, metric in (("rank_best", "rank_gmean"), ("zeroshot_best", "top1")):
            values = snapshot.values(arm, snapshot.study.measure(name))
            finished = snapshot.finished(arm).items()
            assert values == {
                seed: record.value("icons/test_concepts", similarity + metric) for seed, record in finished
            }


def test_the_committed_page_is_that_of_the_committed_files(tmp_path):
    """Byte for byte; python -m studies duel --page writes it."""
    docs = ROOT / "docs"
    page.write(tmp_path, command.declared(command.HOME), wrong.read_areas(command.HOME))
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    committed = [docs / "duel.md", *docs.glob("duel/*.svg")]
    assert made == {path.relative_to(docs): path.read_bytes() for path in committed}


# --- terms


def logits(seed, k=6, b=5):
    return {f"s_{m}": jnp.asarray(np.random.default_rng((seed, i)).normal(size=(b, k)), jnp.float32)
            for i, m in enumerate(("img", "txt"))}  # fmt: skip


def model(k):
    return types.SimpleNamespace(cluster_head=types.SimpleNamespace(clusters=k))


def test_a_marginal_of_the_batch_is_plain_nclip():
    plain, ours = Nclip(tau=0.7), terms.ScheduledNclip(tau=0.7)
    start = ours.initial_state(model(6), 1)
    for x in (logits(0), logits(1)):
        (a, da), (b, db) = (
            jax.value_and_grad(lambda s, t=t: t(s, None, start, {})[0])(x) for t in (plain, ours)
        )  # fmt: skip
        assert float(b) == pytest.approx(float(a), abs=1e-5)
        jax.tree.map(lambda g, h: np.testing.assert_allclose(h, g, atol=1e-6), da, db)


def test_a_running_marginal_against_its_definition():
    ours, plain = terms.ScheduledNclip(momentum=0.9, smoothness=3.0, tau=0.5), Nclip(smoothness=0.0, tau=0.5)
    carried, m = ours.initial_state(model(6), 1), np.full((2, 6), 1 / 6)
    for step in range(3):
        x = logits(step)
        loss, _, carried = ours(x, None, carried, {})
        p = [np.exp(np.float64(s) / 0.5) for s in x.values()]
        mean = np.stack([(q / q.sum(axis=1, keepdims=True)).mean(axis=0) for q in p])
        m = 0.9 * m + 0.1 * mean
        expected = float(plain(x, None, {}, {})[0]) + 3.0 / 2 * (mean * np.log(m)).sum()
        assert float(loss) == pytest.approx(expected, abs=1e-5)
        np.testing.assert_allclose(carried["marginal_txt"], m[1], atol=1e-6)


@pytest.mark.parametrize(("schedule", "weights"), [("constant", (1, 1, 1)), ("early", (2, 1, 0)), ("late", (0, 1, 2))])
def test_weights_over_the_run(schedule, weights):
    ours = terms.ScheduledNclip(schedule=schedule, horizon=2)
    carried, x = ours.initial_state(model(6), 1), logits(0)
    for weight in weights:
        loss, metrics, carried = ours(x, None, carried, {})
        assert float(loss) == pytest.approx(weight * float(metrics["loss"]), abs=1e-6)
        assert float(metrics["weight"]) == weight


def test_the_second_head_against_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 7, 4))
    out = {"second_img": jnp.asarray(x), "second_txt": jnp.asarray(y), "second_scale": jnp.asarray(5.0)}
    loss, _, _ = terms.SecondHead()(out, None, {}, {})
    same = terms.SecondHead(positives="caption")
    assert "text_key" in same.fields and float(same(out, None, {}, {"text_key": jnp.arange(7)})[0]) == float(loss)
    assert float(same(out, None, {}, {"text_key": jnp.arange(7) // 2})[0]) != float(loss)
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    own = mechanism.pair_losses(a, b, 5.0, block=7)
    s = np.exp(5 * a @ b.T)
    by_hand = [-np.log(s[i, i] / s[i].sum()) / 2 - np.log(s[i, i] / s[:, i].sum()) / 2 for i in range(7)]
    np.testing.assert_allclose(own, by_hand, rtol=1e-6)
    assert float(loss) == pytest.approx(np.mean(by_hand), abs=1e-5)
    scores = terms.SecondSimilarity()
    np.testing.assert_allclose(scores.scores(x, scores.rows(y))[""], a @ b.T, atol=1e-6)


# --- costs, and pairs that are wrong


def test_the_area_under_the_curve_is_a_probability():
    rng = np.random.default_rng(0)
    suspicion, wrong = rng.integers(0, 5, 40), rng.random(40) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in suspicion[wrong] for b in suspicion[~wrong]]
    assert mechanism.auc(suspicion, wrong) == pytest.approx(100 * np.mean(pairs))
    assert mechanism.auc(wrong.astype(float), wrong) == 100


def test_costs_are_read_from_their_last_line(tmp_path):
    path = tmp_path / "costs.jsonl"
    assert stages.read_costs(path) == {}
    for ratio in (1.2, 1.1):
        cost.write(path, "final_xclip", "final_clip", "0" * 40, {"ratio": ratio, "turns": 1})
    assert stages.read_costs(path) == {"final_xclip": 1.1}


@pytest.mark.long
@pytest.mark.slow
def test_two_configs_take_steps_in_turn():
    measured = cost.measure(tiny.config("xclip"), tiny.config("clip"), turns=1, steps=1)
    assert 0.05 < measured["ratio"] < 20 and measured["low"] <= measured["ratio"] <= measured["high"]


@pytest.mark.long
@pytest.mark.parametrize("candidate", [c for c in spaces.candidates("xclip") if c["momentum"]][:1])
def test_a_candidate_takes_steps(candidate):
    matrix = stages.DuelMatrix(tiny_study.study(tuned=False), tiny_study.load)
    changes = spaces.xclip(candidate, 4, "k256_linear")
    config = matrix.config(Arm("candidate", "", "core", "tiny:objective=xclip", changes), 0, {})
    experiment = build.build(config)
    current = state.create(experiment.init, experiment.abstract)
    losses = []
    for _ in range(3):
        current, metrics = experiment.compiled(current, cost.batch(experiment))
        losses.append(float(metrics["nclip/loss"]))
    assert np.isfinite(losses).all() and len(set(losses)) == 3


@pytest.mark.long
@pytest.mark.slow
def test_a_run_with_wrong_captions_leaves_its_record_and_what_it_knows(tmp_path, pairs, monkeypatch):
    monkeypatch.setenv(tiny_study.PAIRS, str(pairs))
    candidate = spaces.candidates("xclip")[1]
    changes = spaces.xclip(candidate, 4, "k256_linear") | {"data.caption_noise": 0.5}
    arm = Arm("wrong25_xclip", "xCLIP", "dose", "tiny:objective=xclip", changes, (0,))
    nothing = dict.fromkeys(("claims", "doses", "controls"), ()) | {"choices": {}, "common": {}, "weights": {}}
    study = tiny_study.study(tuned=False, arms=(arm,), baseline=arm.name, shown=((), ()), **nothing)
    matrix = stages.DuelMatrix(study, tiny_study.load)
    runner = command.DuelRunner(matrix, tmp_path / "runs.jsonl", tmp_path / "scratch", allow_dirty=True)
    assert runner.run()
    (record,) = (json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines())
    assert record["arm"] == arm.name and record["results"]
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all({"loss", "cosine", "clusters"} < line.keys() and 0 < line["wrong"] < line["pairs"] for line in lines)
    assert not list(pathlib.Path(tmp_path / "scratch").glob("wrong25*"))


def test_a_second_head_is_an_objective():
    settings = spaces.candidates("clip")[0]
    arm = stages.arm_of("final_second", "", "core", "clip", spaces.rival("second", settings, 10, "k256_h256"), (0,))
    config = stages.DuelMatrix(stages.study_of([arm]), stages.load_config).config(arm, 0, {})
    objective = make_objective(build.resolve(config).objective)
    assert objective.weights == {"clip": 0.5, "second": 0.5}
    assert [similarity.name for similarity in objective.similarities] == ["embedding", "second"]

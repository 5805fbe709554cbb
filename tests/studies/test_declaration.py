"""Studies: the declaration and its checks, records of runs and choices on validation."""

import dataclasses
import json
import math

import pytest
from flax.traverse_util import unflatten_dict

from studies import page, records
from studies.declaration import Arm, Claim, ClaimPart, DoseResponse, Measure
from studies.matrix import Snapshot, selected
from tests.helpers import tiny
from tests.studies import tiny_study
from tests.studies.greys import TEST_SET, VALIDATION_SET
from tests.studies.made_records import CORE, TUNED, finished, record
from xclip_jax.config import schema
from xclip_jax.config.load import load_config
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.core.storage import write_json
from xclip_jax.evaluators.results import VALIDATION, Provenance, Result, to_json

# --- the declaration


def arms(*more):
    return (*tiny_study.study().arms, *more)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": arms(Arm("clip", "", "core", "tiny:objective=clip"))}, "two arms or choices 'clip'; rename one"),
        ({"arms": arms(Arm("new", "", "cores", "x"))}, "arm 'new': section is 'cores'; expected one of tuning, core"),
        ({"arms": arms(Arm("a/b", "", "core", "x"))}, "arm 'a/b': a name has letters, digits"),
        ({"arms": arms(Arm("new", "", "tuning", "x"))}, "arm 'new': arms of section 'tuning' have an objective"),
        (
            {"arms": arms(Arm("new", "", "core", "x", objective="clip"))},
            "of the others only those of 'factors' may have an objective",
        ),
        ({"arms": arms(Arm("new", "", "core", "x", tuned="siglip"))}, "chosen before has the objective 'siglip'"),
        ({"arms": arms(Arm("new", "", "factors", "x", objective="best"))}, "candidates for 'best'; say by `search`"),
        ({"search": Measure("search", "", TEST_SET)}, "Greys/test' is for validation and for tests"),
        (
            {"choose": Measure("choose", "", TEST_SET)},
            "choose uses the set '.*Greys/test'; expected a set of `validation`",
        ),
        ({"tests": (VALIDATION_SET,)}, "Greys/validation' is for validation and for tests"),
        ({"named": {TEST_SET: "top1"}}, "named has the set '.*Greys/test'; expected sets of `validation`"),
        ({"baseline": "clap"}, "refers to arm 'clap', which it does not have"),
        ({"choices": {"any": ("clip", "clap")}}, "refers to arm 'clap'"),
        ({"claims": (Claim("", (ClaimPart("", "clip", "xclip", "top2"),)),)}, "refers to measure 'top2'"),
        ({"doses": (DoseResponse("x", "", "", ("1",), {"a": ("clip",)}, ("top2",)),)}, "refers to measure 'top2'"),
        ({"doses": (DoseResponse("x", "", "", ("1",), {"a": ("clap",)}, ("top1",)),)}, "refers to arm 'clap'"),
    ],
)
def test_wrong_declarations_are_one_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_study.matrix(**changes)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("core", {"optim.lrr": 1e-3}, "arm 'new': config key 'optim.lrr' is unknown; did you mean 'optim.lr'"),
        ("core", {"optim.lr": "fast"}, "arm 'new': optim.lr cannot be 'fast'"),
        ("core", {"optim.warmup": 9}, "arm 'new': optim.warmup=9 must be below the 4 steps"),
        ("core", {"eval.sets": (TEST_SET,)}, "arm 'new' would be evaluated on '.*/test' before its end or to choose"),
        ("tuning", {"eval.final_sets": (TEST_SET,)}, "arm 'new' would be evaluated on '.*/test' before its end"),
        ("factors", {"eval.final_sets": (TEST_SET,)}, "arm 'new' would be evaluated on '.*/test' before its end"),
    ],
)
def test_arms_see_test_sets_at_their_end_alone(section, changes, message):
    objective = "clip" if section == "tuning" else ""
    new = Arm("new", "", section, "tiny:objective=clip", changes, (0,), objective=objective)
    with pytest.raises(UserError, match=message):
        Snapshot(tiny_study.matrix(arms=arms(new)), {})


def test_configs_of_arms():
    m = tiny_study.matrix(
        arms=arms(Arm("long", "", "controls", "tiny:objective=clip", {"optim.warmup": 2}, (3,), length=2.5))
    )
    runs = {(run.arm.name, run.seed): run for run in Snapshot(m, finished(m, TUNED)).runs}
    long, tuning, core = runs["long", 3].config, runs["tuning_0.001", 9].config, runs["xclip", 1].config
    assert (long.steps, long.optim.warmup, long.seed) == (10, 5, 3)
    assert (tuning.eval.sets, tuning.eval.final_sets, tuning.eval.every) == ((VALIDATION_SET,), (), 0)
    assert (core.eval.final_sets, core.optim.lr, core.objective.name) == ((TEST_SET,), 2e-3, "xclip")


def test_terms_are_replaced():
    terms = {"objective.name": "xclip", "objective.terms": {"clip": 1.0, "nclip": 0.0}}
    m = tiny_study.matrix(arms=arms(Arm("idle", "", "core", "tiny:objective=clip", terms, (0,))))
    (run,) = (run for run in Snapshot(m, {}).runs if run.arm.name == "idle")
    assert run.config.objective.terms.to_dict() == {"clip": 1.0, "nclip": 0.0}


# --- choices on validation


def test_the_best_recipe_on_validation_is_taken_over():
    m = tiny_study.matrix()
    waiting = Snapshot(m, finished(m, {"tuning_0.001": 10.0}))
    assert waiting.chosen == {"clip": None}
    assert {run.arm.name for run in waiting.runs if not run.key} == {"clip", "xclip", "clip_again"}
    chosen = Snapshot(m, finished(m, TUNED))
    assert chosen.chosen["clip"].name == "tuning_0.002"
    assert {run.config.optim.lr for run in chosen.runs if run.arm.section != "tuning"} == {2e-3}
    down = tiny_study.matrix(choose=Measure("choose", "", VALIDATION_SET, higher=False))
    assert Snapshot(down, finished(down, TUNED)).chosen["clip"].name == "tuning_0.001"


def test_a_search_is_on_validation_and_its_best_is_tested():
    """Candidates start from the recipe that was chosen before, and so does the arm that takes the best of them over."""
    searched = f"{VALIDATION_SET}/again"
    taus = [
        Arm(f"tau_{tau:g}", f"tau {tau:g}", "factors", "tiny:objective=nclip", {"objective.nclip.tau": tau}, (0,),
            objective="best", tuned="clip")
        for tau in (0.5, 2.0)
    ]  # fmt: skip
    best = Arm("best", "the best", "controls", "tiny:objective=nclip", {}, (0,), tuned="best")
    m = tiny_study.matrix(arms=arms(*taus, best), search=Measure("search", "shades", searched))
    runs = {run.arm.name: run for run in Snapshot(m, finished(m, TUNED)).runs}
    for tau in taus:
        config = runs[tau.name].config
        assert (config.eval.sets, config.eval.final_sets) == ((VALIDATION_SET, searched), ())
        assert config.optim.lr == 2e-3
    assert not runs["best"].key and runs["tau_0.5"].key
    assert not {run.arm.name for run in Snapshot(m, {}).runs if run.key} & {"tau_0.5", "best"}

    made = finished(m, TUNED)
    made |= {runs[name].key: record(runs[name], value) for name, value in (("tau_0.5", 3.0), ("tau_2", 4.0))}
    after = Snapshot(m, made)
    (run,) = (run for run in after.runs if run.arm.name == "best")
    assert (run.config.optim.lr, run.config.objective.nclip.tau) == (2e-3, 2.0)
    assert run.config.eval.final_sets == (TEST_SET,)
    text = page.render(after, {})
    assert "Best of the 2 candidates for the best, by shades: **tau 2**." in text
    assert "### best" not in text


def test_a_candidate_that_diverged_is_not_chosen():
    m = tiny_study.matrix()
    runs = {run.arm.name: run for run in Snapshot(m, {}).runs if run.arm.section == "tuning"}
    made = [record(runs["tuning_0.001"], 1.0), record(runs["tuning_0.002"], 9.0, error="loss of step 3 is nan")]
    assert Snapshot(m, {r.key: r for r in made}).chosen["clip"].name == "tuning_0.001"


def test_a_choice_at_the_edge_of_the_grid_is_named():
    for lr, words in ((3e-3, True), (1.5e-3, False)):
        new = Arm("tuning_new", "new", "tuning", "tiny:objective=clip", {"optim.lr": lr}, (9,), objective="clip")
        m = tiny_study.matrix(arms=arms(new))
        text = page.render(Snapshot(m, finished(m, TUNED | {"tuning_new": 30.0})), {})
        assert ("At the edge of what was tried: optim.lr." in text) == words


def test_choices_between_arms_are_made_on_validation():
    m = tiny_study.matrix()
    made = finished(m, TUNED | CORE)
    swapped = dict(made)
    for key, r in made.items():
        if r.section == "core":  # by the tests xCLIP is still the better one
            first, *others = r.results
            swapped[key] = dataclasses.replace(r, results=[dataclasses.replace(first, value=-first.value), *others])
    assert Snapshot(m, made).choice("any") == "xclip" and Snapshot(m, swapped).choice("any") == "clip"
    assert Snapshot(m, finished(m, TUNED | {"clip": 1.0})).choice("any") is None
    assert Snapshot(m, {}).choice("clip") == "clip"


def test_arms_of_one_config_share_their_runs():
    m = tiny_study.matrix()
    before, after = Snapshot(m, {}), Snapshot(m, finished(m, TUNED | CORE))
    assert after.values("clip_again", m.study.measure("top1")) == CORE["clip"]
    chosen = selected(before, ("core", "clip_again"))
    assert [(run.arm.name, run.seed) for run in chosen] == [("clip", 0), ("xclip", 0), ("clip", 1), ("xclip", 1)]
    assert len(after.runs) == 8 and not after.missing()


def test_a_changed_declaration_does_not_use_old_runs():
    old, new = tiny_study.matrix(), tiny_study.matrix(steps=5)
    made = finished(old, TUNED | CORE)
    snapshot = Snapshot(new, made)
    assert len(snapshot.missing()) == len(snapshot.runs) and len(snapshot.unused()) == len(made) == 6
    assert "Records of no arm of the present declaration" in page.render(snapshot, {})


# --- records


def test_records_are_read_as_they_were_written(tmp_path):
    m = tiny_study.matrix()
    made = finished(m, TUNED | CORE)
    path = tmp_path / "runs.jsonl"
    for r in reversed(made.values()):
        assert records.write(path, r) == r.name
    assert len(path.read_bytes()) < 8000 * len(made)
    again = records.read_all(path)
    assert [r.name for r in again.values()] == sorted(r.name for r in made.values()) and again.keys() == made.keys()
    for key, r in again.items():
        assert records.render(r) == records.render(made[key])
        assert to_json(r.results) == to_json(made[key].results)
    with pytest.raises(UserError, match=r"runs\.jsonl has .*: this run is finished; delete its line to run it again"):
        records.write(path, next(iter(made.values())))
    assert records.read_all(path).keys() == made.keys()


def test_the_key_is_of_what_decides_the_result():
    def key(**changes):
        return records.config_key(tiny.config("clip", **changes).to_dict())

    assert key() == key(run="elsewhere", data__threads=7, checkpoint__every=3, log__every=9, data__dir="/data")
    assert len({key(), key(seed=1), key(steps=11), key(optim__lr=2e-3), key(eval__sets=("a",))}) == 5
    # Keys that a record lacks have their defaults.
    flat = schema.flatten(tiny.config("clip").to_dict())
    lacking = {name: value for name, value in flat.items() if name != "data.caption_noise"}
    assert records.config_key(unflatten_dict(lacking, sep=".")) == key()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda text: text[:50],
            r"runs\.jsonl, line 2, is not the record of a run \(JSONDecodeError: .*; restore it",
        ),
        (lambda text: "[]", r"runs\.jsonl, line 2, is not the record of a run"),
        (lambda text: text.replace('"seed": 9}', '"seed": 8}'), "the seed is not that of the config"),
    ],
)
def test_damaged_records_are_one_sentence(tmp_path, damage, message):
    first, second = map(records.render, finished(tiny_study.matrix(), TUNED).values())
    path = tmp_path / "runs.jsonl"
    path.write_text(first + second)
    assert len(records.read_all(path)) == 2
    path.write_text(first + damage(second))
    with pytest.raises(UserError, match=message):
        records.read_all(path)


def test_two_records_of_one_run_are_refused(tmp_path):
    r = next(iter(finished(tiny_study.matrix(), TUNED).values()))
    path = tmp_path / "runs.jsonl"
    path.write_text(records.render(r) + records.render(dataclasses.replace(r, arm="another")))
    with pytest.raises(UserError, match=r"line 2, repeats another-s9-\w+, with one config and seed; delete one"):
        records.read_all(path)


def run_folder(path, sets, role):
    folder = RunFolder(path)
    config = schema.to_dict(schema.resolve(tiny.config("clip", run=path, steps=100, data__sources=("folder:a",))))
    environment = {"command": "x", "commit": "y", "devices": "1 x cpu", "versions": {}}
    write_json(folder.config_file, {"config": config, "environment": environment})
    lines = [{"step": i, "loss": 1 / i, "samples_per_second": 32.0, "clip/loss": math.nan} for i in range(1, 101)]
    text = "".join(json.dumps(line).replace("NaN", "null") + "\n" for line in lines)
    folder.metrics_file.write_text(text)
    results = [Result(name, "zeroshot", "top1", 12.3456789, protocol=Provenance(role=role)) for name in sets]
    results += [Result(sets[0], "zeroshot", "top1", 1.0, group="one artist", protocol=Provenance(role=role))]
    details = {"results": {}, "records": to_json(results), "environment": environment, "seconds": 3.21}
    write_json(folder.results_file, details | {"config": config})


ABOUT = {"arm": "clip", "commit": "c", "workers": 1, "error": ""}


def test_a_run_is_collected_from_its_folder(tmp_path):
    run_folder(tmp_path, ["a"], VALIDATION)
    r = records.collect(tmp_path, section="tuning", **ABOUT)
    assert r.seconds == {"training": 50.0, "evaluation": 3.2} and r.environment["workers"] == 1
    assert r.value("a", "top1") == 12.3457 and r.value("", "loss") == 0.01 and r.value("b", "") is None
    assert len(r.curve["step"]) == records.CURVE_POINTS and r.curve["step"][-1] == 100 and r.curve["loss"][0] == 1.0
    assert len(r.results) == 1 and "run" not in r.config


@pytest.mark.parametrize("section", ["tuning", "factors"])
def test_candidates_on_sets_that_are_not_for_validation_are_refused(tmp_path, section):
    run_folder(tmp_path, ["validation_by_name"], "")
    with pytest.raises(UserError, match=f"arm 'clip' is {section} and was evaluated on validation_by_name, not for"):
        records.collect(tmp_path, section=section, **ABOUT)
    assert records.collect(tmp_path, section="core", **ABOUT).results


def test_only_finished_runs_are_collected(tmp_path):
    run_folder(tmp_path, ["a"], "")
    (tmp_path / "results.json").unlink()
    with pytest.raises(UserError, match="is not a finished run"):
        records.collect(tmp_path, section="core", **ABOUT)
    diverged = records.collect(tmp_path, section="core", **ABOUT | {"error": "loss of step 3 is nan"})
    assert diverged.error and not diverged.results and diverged.seconds["evaluation"] is None


def test_names_of_sets_and_sources_are_short_in_records():
    """A run is the same under the names that configs have, and under the short ones."""
    config = load_config("studies/icons/recipe.py")
    names = (*config.data.sources, *config.eval.sets, *config.eval.final_sets, "emoji/test_concepts", "folder:icons/a")
    assert records.short(names)[:2] == ["icons:train", "icons/validation_concepts"]
    assert [records.full(name) for name in records.short(names)] == list(names)
    assert records.short((1, 0.5, None)) == [1, 0.5, None] and records.short("icons/test_dense") == "icons/test_dense"

    key = records.config_key(config.to_dict())
    config.data.sources = tuple(records.short(config.data.sources))
    config.eval.sets = tuple(records.short(config.eval.sets))
    config.eval.final_sets = tuple(records.short(config.eval.final_sets))
    assert records.config_key(config.to_dict()) == key
    config.data.sources = ("icons:test_concepts",)
    assert records.config_key(config.to_dict()) != key

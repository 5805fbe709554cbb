"""Studies: the page, estimates and the declared study."""

import dataclasses
import math
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree

import pytest
import scipy.stats

from studies import page, records, tables, verdicts
from studies.cc12m import study as cc12m
from studies.declaration import Arm, Claim, ClaimPart, DoseResponse, ExtraComparisons, Measure
from studies.icons import study as icons
from studies.matrix import Matrix, Snapshot, overview, seconds_of
from tests.studies import tiny_study
from tests.studies.greys import TEST_SET, VALIDATION_SET
from tests.studies.made_records import CORE, TUNED, finished, record
from tests.studies.tiny_study import four_seeds, over_seeds
from xclip_jax.config import load

ROOT = pathlib.Path(__file__).parents[2]
RUNS = ROOT / "studies" / "icons" / "runs.jsonl"


# --- the page


def test_lower_is_better_and_ratios_are_geometric():
    m = tiny_study.matrix(tuned=False)
    snapshot = Snapshot(m, finished(m, CORE))
    loss = m.study.measure("loss")  # of the last step: 2 and 3 for seeds 0 and 1, in both arms
    assert verdicts.difference(snapshot, "clip", "xclip", loss).mean == 0
    row = next(line for line in page.render(snapshot, {}).splitlines() if line.startswith("| CLIP | 2 |"))
    assert f"{math.sqrt(6):.1f} (n = 2)" in row


def test_the_page_is_the_same_from_the_same_files(tmp_path):
    m = tiny_study.matrix()
    for r in finished(m, TUNED | CORE).values():
        records.write(tmp_path / "study" / "runs.jsonl", r)
    (tmp_path / "study" / "old.svg").write_text("a chart of an earlier declaration")
    pages = []
    for _ in range(2):
        page.write(tmp_path, Snapshot(tiny_study.matrix(), records.read_all(tmp_path / "study" / "runs.jsonl")))
        files = [tmp_path / "study.md", *sorted((tmp_path / "study").glob("*.svg"))]
        pages.append({path.name: path.read_bytes() for path in files})
    assert pages[0] == pages[1]
    charts = ["contrastive_loss.svg", "dose_data.svg", "finding.svg", "weights.svg"]
    assert sorted(pages[0]) == sorted([*charts, "study.md"])
    text = pages[0]["study.md"].decode()
    assert "All 6 runs are finished." in text and "lr 0.002 **chosen**" in text and "Interim" not in text
    row = "| xCLIP − CLIP | top-1 | +4.5 (n = 2) | 2 | 2 of 2 | 0.0704 | 0.0704 | 1.0000 | 0.5000 | undecided |"
    assert row in text
    for name, svg in pages[0].items():
        if name.endswith(".svg"):
            assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg")
            assert f"(study/{name})" in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "**No run has been made yet**: this page declares the study and its 6 runs."),
        (TUNED, "**2 runs are finished, 4 are missing.**"),
        (TUNED, "**Interim: 0 of 2 seeds**"),
        (TUNED | {"clip": CORE["clip"]}, "**Interim: 0 of 2 seeds**"),
        (TUNED, "* core, arms with seeds: `clip` (0, 1), `xclip` (0, 1)"),
        (TUNED | {"clip": CORE["clip"]}, "| xCLIP | 0 of 2 | - | - |"),
    ],
)
def test_the_page_says_what_is_missing(values, words):
    m = tiny_study.matrix()
    text = page.render(Snapshot(m, finished(m, values)), {})
    assert words in text and ("Undecided" if values.get("xclip") else "**Nothing to compare yet.**") in text


def test_what_is_missing_is_said_beside_the_verdicts():
    more = Arm("clip_longer", "", "controls", "tiny:objective=clip", {}, (0, 1), length=2.0)
    m = tiny_study.matrix(
        tuned=False, arms=(*tiny_study.study(tuned=False).arms, more), scope="On grey",
        controls=(("any", "clip_longer", "gain beyond time"),),
    )  # fmt: skip
    made = finished(m, CORE)
    text = page.render(Snapshot(m, made), {})
    assert "Interim" not in text and "**2 of 4 runs of controls are missing**" in text.partition("### Claim 1")[0]
    second = next(key for key, r in made.items() if (r.arm, r.seed) == ("xclip", 1))
    part = Snapshot(m, {key: r for key, r in made.items() if key != second})
    assert "**Interim: 1 of 2 seeds**" in page.render(part, {})
    assert "*Interim: 1 of 2 seeds; On grey; 3 of 6 runs are missing.*" in page.finding(part)


def test_gains_beyond_controls_are_corrected_for_their_number():
    longer, smooth = (Arm(name, name, "controls", "tiny:objective=clip", {}, length=length)
                      for name, length in (("clip_longer", 2.0), ("clip_smooth", 3.0)))  # fmt: skip
    declared = {"measures": (Measure("top1", "top-1", TEST_SET),), "doses": (), "claims": ()}
    one, two = ("xclip", "clip_longer", "gain over time"), ("xclip", "clip_smooth", "gain over softness")
    values = CORE | {"clip": over_seeds(1.0, 1.0, 1.0, 1.0), "xclip": over_seeds(20.4, 21.2, 22.3, 22.1)}
    values |= {"clip_longer": over_seeds(20.0, 20.0, 20.0, 20.0), "clip_smooth": over_seeds(30.0, 10.0, 30.0, 10.0)}
    texts = []
    for controls, floor in (((one,), ""), ((one, two), ""), ((one, two), "clip_smooth")):
        m = four_seeds(longer, smooth, controls=controls, floor=floor, **declared)
        texts.append(page.render(Snapshot(m, finished(m, values)), {}))
    assert "* top-1: gain over time\n" in texts[0]
    assert "* over no control: top-1\n" in texts[1]  # p 0.043, and twice that
    assert "* top-1: gain over time\n" in texts[2]  # what is the baseline again counts for nothing
    assert "| clip_smooth | +19.0 [" in texts[2]  # both, from CLIP
    assert "* no control has the runs yet\n" in page.render(Snapshot(m, {}), {})


def test_a_sought_setting_has_differences_and_those_of_unseen_seeds():
    part = ClaimPart("it is better", "xclip", "clip", "top1")
    claim = Claim("A setting is better.", (part,), tuned_on_seeds=(0, 1))
    m = four_seeds(claims=(claim,), tuned_comparisons=(("xclip", "clip", "what it is worth"),),
                   secondary=(Measure("again", "top-1 again", TEST_SET),))  # fmt: skip
    values = {"clip": over_seeds(20.0, 20.0, 20.0, 20.0), "xclip": over_seeds(22.0, 22.0, 21.0, 21.0)}
    text = page.render(Snapshot(m, finished(m, values)), {})
    assert "| xCLIP − CLIP | what it is worth | +1.5 [" in text and "| xCLIP | +1.5 [+0.6, +2.4], 4/4 |" in text
    unseen = text.partition("Without the seeds 0, 1")[2] or text.partition("without the seeds 0, 1")[2]
    assert "| top-1 | +1.0 (n = 2) | 2 | 2 of 2 |" in unseen.partition("###")[0]


def test_a_dose_says_how_the_difference_changes():
    lines = {"CLIP": ("clip", "clip_again"), "xCLIP": ("xclip", "xclip")}
    controls = (("xclip", "clip", "gain over nothing"),)
    dose = DoseResponse("data", "Data", "share", ("0", "1"), lines, ("top1",), controls)
    half = dataclasses.replace(tiny_study.study(tuned=False).arms[-1], changes={"data.subset": 0.5})
    arms = [dataclasses.replace(arm, seeds=(0, 1, 2)) for arm in (*tiny_study.study(tuned=False).arms[:-1], half)]
    m = tiny_study.matrix(tuned=False, arms=arms, doses=(dose,))
    clip, half_data, xclip = {0: 20.0, 1: 22.0, 2: 21.0}, {0: 17.0, 1: 20.0, 2: 18.0}, {0: 24.0, 1: 27.0, 2: 26.0}
    made = finished(m, {"clip": clip, "clip_again": half_data, "xclip": xclip})
    text = page.render(Snapshot(m, made), {})
    # 4, 5 and 5 at the first level; 7, 7 and 8 at the last
    assert "| its change from 0 | - | +2.7 [+1.2, +4.1], 3/3 |" in text
    welch = (scipy.stats.ttest_ind(list(xclip.values()), list(a.values()), equal_var=False) for a in (clip, half_data))
    texts = [f"[{ends.low:+.1f}, {ends.high:+.1f}]" for ends in (test.confidence_interval() for test in welch)]
    assert f"| the same, unpaired | {texts[0]} | {texts[1]} |" in text
    assert "| the same, unpaired | - | [+" in text or "| the same, unpaired | - | [-" in text
    assert f"| xCLIP − CLIP | gain over nothing | +4.7 [+3.2, +6.1], 3/3; unpaired {texts[0]} |" in text
    assert "Nothing to compare yet" in page.render(Snapshot(m, {}), {})
    two = Snapshot(m, {key: r for key, r in made.items() if r.seed < 2})
    assert "| xCLIP − CLIP | +4.5 (n = 2), 2/2 |" in page.render(two, {})
    assert "| the same, unpaired | - | - |" in page.render(two, {})


def test_runs_at_chance_and_of_two_seeds_are_shown_as_they_are():
    m = tiny_study.matrix(tuned=False)
    text = page.render(Snapshot(m, finished(m, {"clip": {0: 25.0, 1: 26.0}, "xclip": {0: 27.0, 1: 25.0}})), {})
    assert "Runs at chance, which are in all means: top-1 (CLIP, seed 0; xCLIP, seed 1)." in text
    rows = tables.rows_of(Snapshot(m, finished(m, CORE)), {"CLIP": "clip"}, m.study.measures[:1], each=True)
    assert rows == [["CLIP", "2", "21.0 (20.0, 22.0)"]]


def test_choices_are_shown_by_seed_and_without_each():
    part = ClaimPart("top-1 is higher", "any", "clip", "top1")
    m = tiny_study.matrix(tuned=False, claims=(Claim("Any is better.", (part,), all_choices=True),))
    snapshot = Snapshot(m, finished(m, {"clip": {0: 20.0, 1: 22.0}, "xclip": {0: 23.0, 1: 21.0}}))
    assert [snapshot.choice("any", without=seed) for seed in (None, 0, 1)] == ["xclip", "clip", "xclip"]
    text = page.render(snapshot, {})
    assert "| xCLIP **chosen** | 22.00 | 23.00 | 21.00 |" in text and "is chosen in 1 of 2 cases" in text
    others = text.partition("without a verdict:")[2].partition("###")[0]
    assert "| CLIP − CLIP |" in others and "xCLIP −" not in others


def test_measures_have_items_and_chance_of_the_run_files():
    m = tiny_study.matrix(measures=(Measure("top1", "top-1", TEST_SET, what="shades by name"),
                                    tiny_study.study().measure("loss")))  # fmt: skip
    assert "| top-1 | shades by name | - | - |" in page.render(Snapshot(m, {}), {})
    assert "| top-1 | shades by name | 24 | 25.0 |" in page.render(Snapshot(m, finished(m, TUNED | CORE)), {})


def test_commits_have_their_arms_and_seeds():
    m = tiny_study.matrix(tuned=False, commits="They differ in nothing.")
    first, later = "a" * 40, "b" * 40 + "-dirty"
    of_run = {("clip", 0): first, ("xclip", 0): first, ("clip", 1): first, ("xclip", 1): f"{first}, {later}"}
    made = {k: dataclasses.replace(r, commit=of_run[r.arm, r.seed]) for k, r in finished(m, CORE).items()}
    text = page.render(Snapshot(m, made), {})
    assert "| aaaaaaaa | `clip` (0, 1), `xclip` (0) |" in text and "They differ in nothing." in text
    assert "| aaaaaaaa \u2192 bbbbbbbb-dirty | `xclip` (1) |" in text


def test_diverged_runs_are_listed():
    m = tiny_study.matrix(tuned=False)
    runs = [run for run in Snapshot(m, {}).runs if run.arm.name == "clip"]
    made = [record(runs[0], 20.0), record(runs[1], 0.0, error="loss of step 3 is nan")]
    text = page.render(Snapshot(m, {r.key: r for r in made}), {})
    assert Snapshot(m, {r.key: r for r in made}).choice("any") is None  # xCLIP has no run, and CLIP is not eligible
    assert "| CLIP | 2, 1 diverged | 20.0 (n = 1) |" in text and "* `clip`, seed 1: loss of step 3 is nan" in text


# --- estimates, and the declared study


def test_the_similarity_is_chosen_on_validation():
    """Clusters are better on validation and worse on the test: they are what is read."""
    m = tiny_study.matrix(named={VALIDATION_SET: "top1"})
    snapshot = Snapshot(m, finished(m, TUNED | {"clip": 1.0, "xclip": 2.0}))
    assert "similarity classifies best" not in page.render(snapshot, {})
    numbers = {VALIDATION_SET: 30.0, TEST_SET: 1.5}
    records_of = {
        key: dataclasses.replace(
            r, results=[*r.results, *(dataclasses.replace(x, score="clusters", value=numbers[x.set], headline=False)
                                      for x in r.results)]
        )
        for key, r in snapshot.records.items()
    }  # fmt: skip
    text = page.render(Snapshot(m, records_of), {})
    assert "| arm | its own, validation | clusters, validation | chosen |" in text
    row = "| 2.0 (n = 2) | 30.0 (n = 2) | clusters | 1.5 (n = 2) | +0.0 (n = 2), 0/"
    assert row in text and "| 1.0 (n = 2) | 30.0 (n = 2) | clusters | 1.5 (n = 2) | - |" in text


def test_estimates_follow_measured_runs():
    m = tiny_study.matrix(tuned=False)
    nothing = Snapshot(m, {})
    runs = nothing.runs
    assert seconds_of(nothing, runs[0]) == 4 * 16 * m.study.seconds_per_pair + 60
    made = record(runs[0], 1.0, seconds=50.0)
    snapshot = Snapshot(m, {made.key: made})
    xclip = next(run for run in runs if run.arm.name == "xclip")
    assert seconds_of(snapshot, runs[1]) == 55.0 == seconds_of(snapshot, xclip)
    table = overview(snapshot, ("core",))
    assert "clip   core         2     1        0.02" in table and "clip_again" not in table


def test_the_declared_study():
    m = Matrix(icons.study(), load.load_config)
    snapshot = Snapshot(m, {})
    by_section = {name: m.study.of_section(name) for name in ("tuning", "core", "controls", "dose", "factors")}
    for objective in ("clip", "siglip", "nclip", "xclip"):
        candidates = [arm.changes for arm in by_section["tuning"] if arm.objective == objective]
        assert len({changes["optim.lr"] for changes in candidates}) >= 4
    assert len(by_section["core"]) == 6
    assert all(len(arm.seeds) == 5 for name in ("core", "controls") for arm in by_section[name])
    core = {seed for arm in by_section["core"] for seed in arm.seeds}
    assert not core & {seed for arm in by_section["tuning"] for seed in arm.seeds}
    configs = {run.arm.name: run.config for run in snapshot.runs}
    assert configs["clip_idle_head"].objective.terms.to_dict() == {"clip": 1.0, "nclip": 0.0}
    assert configs["xclip_shuffled"].objective.nclip.shuffle_targets
    assert configs["clip_twice"].steps == 2 * configs["clip"].steps == 2000
    assert configs["clip_batch64"].steps * 64 == configs["clip_batch1024"].steps * 1024 == 2000 * 256
    assert configs["xclip_70"].objective.terms.to_dict() == {"clip": 0.3, "nclip": 0.7}
    assert configs["clip_smoothed"].objective.clip.label_smoothing == 0.1
    assert (configs["clip_noise25"].data.caption_noise, configs["clip_data0.125"].data.subset) == (0.25, 0.125)
    assert len(m.study.claims) == 7 and all("validation" in name for name in m.study.validation)
    assert configs["nclip_tau_2"].eval.final_sets == ()


@pytest.mark.slow
def test_xclip_has_the_setting_that_the_factors_chose():
    m = Matrix(icons.study(), load.load_config)
    snapshot = Snapshot(m, records.read_all(RUNS))
    searched, recipe = (snapshot.chosen[name].changes for name in (icons.SEARCHED, "nclip"))
    setting = {key: value for key, value in searched.items() if recipe.get(key) != value}
    weight = snapshot.study.arm(snapshot.choice("xclip")).changes
    assert {**weight, **setting} == icons.XCLIP_SEARCHED


@pytest.mark.parametrize(
    ("name", "tau"),
    [
        (icons.SEARCHED_XCLIP, 0.35),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((icons.SEARCHED, 0.5), (icons.SEARCHED_AGAIN, 0.35))),
    ],
)
def test_titles_name_the_setting_that_was_chosen(name, tau):
    m = Matrix(icons.study(), load.load_config)
    snapshot = Snapshot(m, records.read_all(RUNS))
    recipe = snapshot.chosen["xclip" if name == icons.SEARCHED_XCLIP else "nclip"].changes
    own = {key: value for key, value in snapshot.chosen[name].changes.items() if recipe.get(key) != value}
    assert own.pop("objective.nclip.tau") == tau and snapshot.study.arm(name).title.endswith(f", tau {tau:g}")
    own.pop("objective.terms", None)
    assert own in ({}, {"objective.nclip.target": "detach"})  # which is the default


@pytest.mark.slow
def test_the_common_recipe_is_that_of_clip():
    m = Matrix(icons.study(), load.load_config)
    snapshot = Snapshot(m, records.read_all(RUNS))
    for name in ("clip", "siglip", "nclip"):
        assert snapshot.finished(f"common_{name}") == snapshot.finished(name) != {}
    assert "the recipe of CLIP, SigLIP, nCLIP too." in page.render(snapshot, {})


@pytest.mark.parametrize("make", [icons.study, cc12m.study], ids=["icons", "cc12m"])
def test_the_committed_page_is_that_of_the_committed_files(make, tmp_path):
    """Byte for byte; python -m studies --page writes it."""
    matrix = Matrix(make(), load.load_config)
    home = ROOT / "studies" / matrix.study.name
    docs = ROOT / "docs" if matrix.study.name == "icons" else home
    page.write(tmp_path, Snapshot(matrix, records.read_all(home / "runs.jsonl")))
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    committed = [docs / "study.md", *docs.glob("study/*.svg")]
    assert made == {path.relative_to(docs): path.read_bytes() for path in committed}


def test_the_finding_is_a_plot_and_a_sentence_on_the_claims(tmp_path):
    m = tiny_study.matrix()
    assert "under way, 0 of 6 runs are finished and none of the core" in page.finding(Snapshot(m, {}))
    snapshot = Snapshot(m, finished(m, TUNED | {"clip": 1.0, "xclip": 2.0}))
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n\n{page.START}\nold\n{page.END}\n\nB\n")
    for _ in range(2):
        page.write_finding(readme, snapshot)
    (tmp_path / "cut.md").write_text(f"# A\n\n{page.START}\nold\n")
    page.write_finding(tmp_path / "cut.md", snapshot)
    assert (tmp_path / "cut.md").read_text().endswith(f"{page.START}\nold\n")  # what follows has no end
    lines = readme.read_text().splitlines()
    assert lines[3] == "![Differences from CLIP](docs/study/finding.svg)"
    assert lines[5].startswith("**Of the paper's 1 claims, 1 is undecided at this scale** (*") and "old" not in lines
    assert lines[-3:] == [page.END, "", "B"]


def test_the_finding_has_what_holds_beside_the_first_claims():
    up, down = ClaimPart("up", "xclip", "clip", "top1"), ClaimPart("down", "xclip", "clip", "top1", better=False)
    loss = ClaimPart("the loss differs", "xclip", "clip", "loss")
    claims = (
        Claim("A.", (loss,)),
        Claim("B.", (down,)),
        Claim("C.", (loss,), short="a short C"),
        Claim("D.", (up, loss)),
        Claim("E.", (up,)),
    )
    columns = {"a tau": (("xclip", "clip"), ("xclip", "xclip")), "other": (("xclip", "clip"),)}
    beside = ExtraComparisons("xCLIP", ("CLIP", "itself"), columns, ("top1", "loss"), "From itself {1}, from CLIP {0}.")
    m = four_seeds(claims=claims, extra_comparisons=beside)
    values = {"clip": over_seeds(20.0, 20.0, 20.0, 20.0), "xclip": over_seeds(21.9, 22.0, 22.1, 22.0)}
    snapshot = Snapshot(m, finished(m, values))
    drawn, _, first, _, second = page.finding(snapshot).splitlines()[:5]
    assert drawn == "![Differences from CLIP](docs/study/finding.svg)"
    assert first == (
        "**Of the paper's 3 claims, 1 fails** (*B*), **2 are undecided at this scale** (*A; a short C*); "
        "refuted: down (+2.0 [+1.9, +2.1], 0 of 4 seeds agree). "
        "*E.* **Holds**: up (+2.0 [+1.9, +2.1], 4 of 4 seeds agree)."
    )
    a, b = (list(values[arm].values()) for arm in ("xclip", "clip"))
    welch = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    ends = f"[{welch.low:+.1f}, {welch.high:+.1f}]"
    text = page.render(snapshot, {})
    assert "| difference from | a tau (4 seeds, unpaired) | other (4 seeds, unpaired) |" in text
    assert f"| CLIP | +2.0 {ends} / x 1.00 [" in text and re.search(r"\| itself \| \+0\.0 .* \| - \|\n", text)
    zero, two = (re.search(rf"^\| {row} \| (.*?) \| ", text, re.MULTILINE)[1] for row in ("itself", "CLIP"))
    assert second == f"From itself {zero}, from CLIP {two}."


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "cores"], "error: --only 'cores' is unknown; did you mean 'core'?"),
        (["--workers", "0"], "error: --workers is 0; expected at least 1."),
    ],
)
def test_bad_command_lines_are_one_sentence(flags, message):
    command = [sys.executable, "-m", "tests.studies.tiny_study", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.strip() == message

import math
import types

import cv2
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sklearn.metrics

from studies.clustered import ClusteredZeroShot, ClusteredZeroShotSet
from studies.photographs import claims, command, corpus, geometry, page, sets, spaces, stages, terms
from studies.records import RunRecord
from xclip_jax.core.errors import UserError
from xclip_jax.data.base import SourceOptions
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.results import Result

KINDS = [f"Kind {i}" for i in range(30)]
FILES = {"train": "train-0.parquet", "validation": "validation-0.parquet", "test": "test-0.parquet"}


def _write(path, kinds, offset):
    rng = np.random.default_rng(offset)
    image = cv2.imencode(".png", rng.integers(0, 255, (8, 6, 3), np.uint8))[1].tobytes()
    n = len(kinds)
    columns = {
        "id": list(range(offset, offset + n)),
        corpus.TITLE: [f"Brand {(i // 30 * 7 + i) % 25} Men Blue {kind}" for i, kind in enumerate(kinds)],
        "gender": ["Men", "Girls"] * (n // 2),
        corpus.KIND_COLUMN: kinds,
        "baseColour": ["Navy Blue", "NA"] * (n // 2),
        "season": ["Summer", "Winter"] * (n // 2),
        "image": [{"bytes": image, "path": None}] * n,
    }
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return n


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder of files like the study's: 30 kinds of 100 photographs, and two further ones."""
    rows = {
        "train": _write(tmp_path / FILES["train"], KINDS * 100, 0),
        "validation": _write(tmp_path / FILES["validation"], KINDS * 4, 10_000),
        "test": _write(tmp_path / FILES["test"], KINDS * 6, 20_000),
        "test_unseen": _write(tmp_path / "unseen_types" / "test-0.parquet", ["New", "Newer"] * 30, 30_000),
    }
    monkeypatch.setattr(corpus, "ROWS", rows)
    monkeypatch.setattr(sets, "PROBED", 400)
    for cached in (corpus._file, corpus.table, corpus.rows, corpus.held_kinds):
        cached.cache_clear()
    return str(tmp_path)


def test_splits_and_captions(shop):
    held = corpus.held_kinds(shop)
    assert len(held) == corpus.HELD_KINDS
    choice, unseen = (corpus.rows(shop, split) for split in ("choice", "validation_unseen"))
    assert {row[corpus.KIND_COLUMN] for row in unseen} == set(held)
    assert not {row[corpus.KIND_COLUMN] for row in choice} & set(held)
    assert sorted(row["id"] for row in (*choice, *unseen)) == list(range(3000))
    first, second = corpus.rows(shop, "test")[:2]
    assert (corpus.tight(first), corpus.tight(second)) == ("men's navy blue kind 0", "girls' kind 1")
    half = corpus.captions(shop, "train", "half")
    titles = sum(caption.startswith("Brand") for caption in half)
    assert 0.45 < titles / len(half) < 0.55

    source = corpus.PhotographSplits.open("choice/tight", SourceOptions(dir=shop))
    assert source[0]["text"] == [corpus.captions(shop, "choice", "tight")[0]]
    loose = corpus.PhotographSplits.open("choice/loose", SourceOptions(dir=shop))
    assert source.fingerprint() != loose.fingerprint()
    for rest in ("choice", "choice/long", "all/loose"):
        with pytest.raises(UserError, match="SPLIT/CAPTIONS"):
            corpus.PhotographSplits.open(rest, SourceOptions(dir=shop))
    with pytest.raises(UserError, match="PHOTOGRAPHS"):
        corpus.folder(shop + "/nowhere")


def test_sets(shop):
    data = DataConfig(dir=shop)
    for name in sets.PhotographSets.names:
        made = sets.PhotographSets.load(name, Preprocessing(8), data, None)
        is_validation = "/validation_" in name
        assert (made.card.role == "validation") == is_validation
    titled = sets.PhotographSets.load(f"{sets.KIND}/validation_unseen_titles", Preprocessing(8), data, None)
    prompts = {prompt for of_class in titled.prompts for prompt in of_class}
    assert len(prompts) == sets.TITLES * len(titled.prompts)
    rows = corpus.rows(shop, "validation_unseen")
    assert len(titled.images) == sum(row[corpus.TITLE] not in prompts for row in rows) > 0


def test_geometry():
    a, b = (np.random.default_rng(n).integers(0, n, 300) for n in (7, 5))
    expected = sklearn.metrics.normalized_mutual_info_score(a, b)
    assert geometry.normalised_information(a, b) == pytest.approx(expected, abs=1e-12)
    assert geometry.normalised_information(a, a) == pytest.approx(1)
    assert geometry.majority(np.array([0, 0, 0, 2]), np.array([1, 1, 0, 3])) == {0: 1, 2: 3}
    # Orthogonal columns of one length have an even spectrum: the rank is their number.
    even = np.concatenate([np.eye(6), -np.eye(6)])
    assert geometry.effective_rank(even) == pytest.approx(6)
    points = np.repeat(np.eye(4), 20, axis=0) + np.random.default_rng(0).normal(0, 0.01, (80, 4))
    fitted, tested = geometry.kmeans(points, points, 4)
    np.testing.assert_array_equal(fitted, tested)


def test_the_second_head_against_its_definition():
    x, y = np.random.default_rng(0).normal(size=(2, 7, 4))
    loss, _, _ = terms.SecondHead()({"second_img": x, "second_txt": y, "second_scale": 5.0}, None, {}, {})
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    s = np.exp(5 * a @ b.T)
    by_hand = [-np.log(s[i, i] ** 2 / s[i].sum() / s[:, i].sum()) / 2 for i in range(7)]
    assert float(loss) == pytest.approx(np.mean(by_hand), abs=1e-5)
    scores = terms.SecondSimilarity()
    np.testing.assert_allclose(scores.scores(x, scores.rows(y))[""], a @ b.T, atol=1e-6)


def _record(arm, values, evaluations=()):
    unseen, known, retrieval, probe = values
    names = stages.VALIDATION
    results = [
        Result(names[0], "zeroshot", "rank_gmean", math.exp(-unseen)),
        Result(names[1], "zeroshot", "rank_gmean", math.exp(-known)),
        *(Result(names[2], "retrieval", f"{d}/r1", retrieval) for d in ("image_to_text", "text_to_image")),
        Result(names[3], "visual", "linear/top1", probe, task="kind"),
    ]
    return RunRecord(arm.name, 0, {"steps": arm.changes["steps"]}, "", {}, results, evaluations=evaluations)


@pytest.fixture
def finish(monkeypatch):
    """Finishes pilots, which settle from a number of steps on, and searches, in which candidate 3 is the best."""

    def finish(settled):
        def record(self, arm, seed):
            if arm.name.startswith("pilot"):
                steps = arm.changes["steps"]
                moved = 0.5 if steps >= settled else 2.0
                lines = [{"step": steps * 6 // 8, "set top1": 50.0}, {"step": steps, "set top1": 50.0 + moved}]
                return _record(arm, (0, 0, 0, 0), lines)
            if arm.name.startswith("search"):
                best = float(arm.name.endswith("_3"))
                return _record(arm, (best, best, 10 * best, 10 * best))
            return None

        monkeypatch.setattr(stages.Photographs, "record", record)

    return finish


@pytest.mark.parametrize(("settled", "length"), [(800, 800), (9999, stages.FALLBACK)])
def test_stages_follow_from_records(finish, settled, length):
    finish(settled)
    study = stages.Photographs({}, {})
    assert study.length == length
    assert study.chosen == {team: candidates[2] for team, candidates in spaces.TEAMS.items()}
    assert {arm.name for arm, _ in study.to_measure} == {"final_xclip", *(f"control_{name}" for name in spaces.TIMED)}
    assert {arm.name[:5] for arm in study.arms if not arm.tested} == {"defau", "pilot", "searc"}
    assert "final_xclip" not in {arm.name for arm in study.arms}

    study = stages.Photographs({}, {arm.name: 1.25 for arm, _ in study.to_measure})
    arms = {arm.name: arm for arm in study.arms}
    assert not study.to_measure and arms["final_xclip"].changes["steps"] == round(length / 1.25)
    assert {f"control_{name}" for name in spaces.CONTROLS} <= arms.keys()
    assert arms["batch_64_clip"].changes["steps"] == 4 * length
    matrix = stages.PhotographsMatrix(stages.study_of(study.arms), stages.load_config)
    for arm in study.arms:  # every arm is a config of the package
        config = matrix.config(arm, 0)
        assert any("/test_" in name for name in (*config.eval.sets, *config.eval.sets_at_end)) == arm.tested
        if arm.tested:
            assert config.data.sources[0].split(":")[2].startswith("train/")


def test_claims_are_of_declared_arms_and_the_page_says_what_is_missing(tmp_path, monkeypatch, finish):
    command.main(["--page", "--home", str(tmp_path), "--docs", str(tmp_path)])
    text = (tmp_path / "tables.md").read_text()
    assert "**39 runs are missing.**" in text and "Winner of xclip: open." in text and "Undecided" in text
    assert [path.name for path in tmp_path.iterdir()] == ["tables.md"]

    finish(800)
    first = stages.Photographs({}, {})
    study = stages.Photographs({}, {arm.name: 1.25 for arm, _ in first.to_measure})
    names = {arm.name for arm in study.arms}
    for part in (part for claim in claims.CLAIMS for part in claim.parts):
        assert {arm for side in (part.plus, part.minus) for arm, _ in part.terms(side)} <= names

    # With values, xCLIP a point ahead.
    monkeypatch.setattr(
        page.Snapshot, "values", lambda self, name, measure: {i: i + ("xclip" in name) for i in range(3)}
    )
    evaluations = [{"step": step, "photographs/validation_known top1": 9.0} for step in (4, 8)]
    monkeypatch.setattr(page.Snapshot, "finished", lambda *_: {0: _record(study.arms[0], (0, 0, 0, 0), evaluations)})
    matrix = stages.PhotographsMatrix(stages.study_of(study.arms), stages.load_config)
    snapshot = page.Snapshot(matrix, {})
    charts = page.charts_of(snapshot)
    assert list(charts) == ["differences", "validation_known_top1"]
    lines = page.lines(study, snapshot, charts)
    assert any(line.startswith("| xCLIP | +1.0 [+1.0, +1.0] |") for line in lines)
    verdicts = [line for line in lines if line in ("**Holds.**", "**Undecided.**")]
    assert verdicts == ["**Holds.**"] * 3 + ["**Undecided.**"] * 2


def test_regrets():
    def run(**points):
        return types.SimpleNamespace(value=lambda name, metric: points.get(name.split("_")[1], 50.0))

    behind = stages.regrets({
        f"defaults_{corpus_name}_{setting}": [run(**points)]
        for corpus_name in ("photographs", "icons")
        for setting, points in (("0.004_0", {"unseen": 60.0}), ("0.008_0.2", {"retrieval": 53.0}))
    })  # fmt: skip
    assert behind["0.008_0.2"]["photographs, unseen kinds"] == 10 and behind["0.004_0"]["icons, retrieval"] == 3
    assert behind["0.004_0"]["photographs, unseen kinds"] == 0


def test_geometric_mean_rank():
    labels = np.array([0, 1, 1, 2, 0])
    scores = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    scores[0] = np.nan

    class Fixed(ClusteredZeroShot):
        def scores(self, variables):
            return {"": scores}

    data = ClusteredZeroShotSet("x", [None] * 5, labels, [["a"], ["b"], ["c"]], {}, ["a", "b", "c"], together=labels)
    result = {r.key: r for r in Fixed(None, data).measure(None)}["rank_gmean"]
    rank = 1 + (scores > np.take_along_axis(scores, labels[:, None], 1)).sum(axis=1)
    rank[0] = 3  # without a valid ranking
    np.testing.assert_array_equal(result.items.groups, labels)
    assert result.value == pytest.approx(np.exp(np.log(rank).mean())) and result.unit == "rank"
    assert result.chance == pytest.approx(6 ** (1 / 3))

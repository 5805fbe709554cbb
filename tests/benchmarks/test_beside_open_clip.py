"""Both sides of `benchmarks.beside_open_clip` on a few pairs, and the table of made-up records."""

import json
import pathlib
import types

import numpy as np
import open_clip
import pytest
import scipy.stats
import torch

import xclip_jax
from benchmarks import beside_open_clip as beside
from tests.helpers import tiny
from xclip_jax.models import two_towers
from xclip_jax.train import trainer, weights


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs the command with flags, its processes in this one, and returns what it printed."""
    folder = tmp_path_factory.mktemp("beside")
    for seed, name in enumerate(("red", "green")):
        tiny.folder(folder / "pairs" / name, 30, seed)
    flags = ["--pairs", f"{folder}/pairs", "--seeds", "3", "--rates", "1e-3", "--seconds", "0.3"]
    flags += ["--evaluate", f"retrieval/{folder}/pairs", "--out", f"{folder}/out"]
    printed = []
    with pytest.MonkeyPatch.context() as patch:

        def main(*argv):
            patch.setattr("sys.argv", ["", *argv])
            beside.main()

        def popen(command, **_):
            return types.SimpleNamespace(wait=lambda: main(*command[3:]))

        patch.setitem(two_towers._SIZES, "Ti", ((32, 1, 2), (24, 1, 3), 16))
        patch.setattr(beside, "TIMED", 2)
        patch.setattr(beside, "subprocess", types.SimpleNamespace(Popen=popen, PIPE=None))
        patch.setattr(beside, "print", lambda text, **_: printed.append(text), raising=False)
        main(*flags)
        yield types.SimpleNamespace(main=main, flags=flags, out=folder / "out", printed=printed)


@pytest.mark.slow
def test_a_command_trains_and_scores_both_sides_once(command):
    *started, table = command.printed
    assert started == [f"{x} ..." for x in ("small-steps", "open_clip-steps", "small-seed3", "open_clip-0.001-seed3")]
    rows = ([x.strip() for x in line.split("|")[1:-1]] for line in table.splitlines())
    names, _, theirs, _ = zip(*rows, strict=True)
    sets = (f"retrieval/folder:{command.flags[1]}", "retrieval/holdout")
    scores = [f"{name}/{way}/r{k}" for name in sets for way in ("image_to_text", "text_to_image") for k in (1, 5)]
    assert sorted(names[7:]) == [*scores, "zeroshot/holdout/top1"]
    found = json.loads((command.out / "open_clip-steps.json").read_text())
    assert theirs[4] == str(found["steps"]) == str(max(int(0.3 / found["seconds_per_step"]), 2))
    command.main(*command.flags)
    command.main(*command.flags[-2:], "--table")
    assert command.printed == [*started, table, table, table]
    with pytest.raises(SystemExit, match=r"settings.json has --seconds 0.3, not 9.0; give the same, or another --out"):
        command.main(*command.flags, "--seconds", "9")


@pytest.mark.slow
def test_both_models_are_those_trained(command):
    """Ours is the model of a run of the recipe, and open_clip's has the embeddings that it has in torch."""
    steps = json.loads((command.out / "small-steps.json").read_text())["steps"]
    config = beside.load.load_config(f"small:pairs={command.flags[1]},steps={steps}")
    config.seed, config.run, config.eval.sets = 3, str(command.out / "run"), ()
    trainer.run(config)
    run, ours = (xclip_jax.load(command.out / name) for name in ("run", "small-seed3"))
    assert ours.fingerprint() == run.fingerprint()
    folder = command.out / "open_clip-0.001-seed3"
    peer = open_clip.model.CLIP(**json.loads((folder / "open_clip_config.json").read_text())["model_cfg"])
    peer.load_state_dict(torch.load(folder / "open_clip_pytorch_model.bin"))
    images, texts = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), np.uint8), ["a", "red", "picture 7"]
    pixels = torch.tensor((images / 255 - np.array(run.preprocessing.mean)) / np.array(run.preprocessing.std)).float()
    tokens = open_clip.SimpleTokenizer()(texts, context_length=run.length)
    with torch.no_grad():
        z = peer.encode_image(pixels.permute(0, 3, 1, 2), normalize=True), peer.encode_text(tokens, normalize=True)
    theirs = xclip_jax.load(folder)
    assert [getattr(theirs.config.model, x) == getattr(run.config.model, x) for x in ("img", "txt", "embed")] == [
        True
    ] * 3
    np.testing.assert_allclose(theirs.encode_image(images), z[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(theirs.encode_text(texts), z[1], rtol=0, atol=1e-4)


def test_updates_and_pixels_are_those_of_the_recipes(tmp_path, monkeypatch):
    monkeypatch.setitem(two_towers._SIZES, "Ti", ((32, 1, 2), (24, 1, 3), 16))
    for seed, name in enumerate(("red", "green")):
        tiny.folder(tmp_path / "pairs" / name, 30, seed)
    pairs = str(tmp_path / "pairs")
    settings = dict.fromkeys(beside.RECIPE, "") | {"pairs": pairs, "evaluate": [f"retrieval/{pairs}"]}
    experiment, _ = beside.opened(settings, 20, 0)
    side = beside.OpenClip(experiment, 1e-2)
    (tmp_path / "model").mkdir()
    side.save(tmp_path / "model")
    loaded = weights.load(str(tmp_path / "model")).experiment
    assert beside.evaluators(settings, experiment, loaded)[0].encoder.preprocessing == experiment.preprocessing
    expected = {name: [x.detach().clone(), 0, 0] for name, x in side.model.named_parameters()}
    batch = {"image": np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), np.uint8)}
    batch["text"] = beside.cpu.random_tokens(np.full(8, 9), experiment.context_length, beside.cpu.VOCAB)
    for t, rate in enumerate((5e-3, 1e-2, 1e-2, 1e-2 * (1 + np.cos(np.pi / 18)) / 2), 1):
        side(batch)
        for name, x in side.model.named_parameters():
            old, m, v = expected[name]
            m, v = 0.9 * m + 0.1 * x.grad, 0.98 * v + 0.02 * x.grad**2
            update = m / (1 - 0.9**t) / ((v / (1 - 0.98**t)).sqrt() + 1e-6) + (0.2 * old if x.ndim > 1 else 0)
            expected[name] = [old - rate * update, m, v]
            torch.testing.assert_close(x.detach(), expected[name][0], rtol=0, atol=1e-5, msg=f"{name}, step {t}")
    side.model.logit_scale.data += 9
    side(batch)
    assert side.model.logit_scale.item() == pytest.approx(np.log(100))
    view, tokens = experiment.preprocessing, torch.tensor(batch["text"]).long()
    pixels = torch.tensor((batch["image"] / 255 - np.array(view.mean)) / np.array(view.std)).float().permute(0, 3, 1, 2)
    loss = open_clip.ClipLoss()(*side.model(pixels, tokens)[:3]).item()
    assert side.step(batch["image"], batch["text"]) == pytest.approx(loss, rel=1e-4)


def test_table_of_records(tmp_path):
    made = {(arm, seed, rate): np.random.default_rng(seed + int(9 * rate)).uniform(20, 30, 4)
            for arm, rate in (("small", 0.0), ("open_clip", 0.2)) for seed in (4, 5, 6)}  # fmt: skip
    made |= {("open_clip", 4, 0.1): np.array([35.0, 0, 90, 90]), ("open_clip", 4, 0.3): np.array([0, 35.0, 90, 90])}
    for job, values in made.items():
        scores = {f"retrieval/holdout/{name}": value for name, value in zip(beside.RECALLS, values, strict=True)}
        record = {"rate": job[2], "steps": 9, "seconds": 8.0, "pairs_per_second": 7.0, "scores": scores}
        (tmp_path / f"{beside.Job(*job).name}.json").write_text(json.dumps(record))
    table = beside.table({"seeds": [4, 5, 6], "rates": [0.1, 0.2, 0.3]}, tmp_path)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert rows[0] == ["rate", "0", "0.2", "", "0.1", "0.3"]
    ours, theirs = np.array(list(made.values())[:6]).reshape(2, 3, 4)[..., 1]
    for cell, x, sign in zip(rows[6][1:], (ours, theirs, ours - theirs), ("", "", "+"), strict=False):
        low, high = scipy.stats.ttest_1samp(x, 0).confidence_interval(0.95)
        assert cell == f"{x.mean():{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
    (tmp_path / "open_clip-0.2-seed6.json").unlink()
    assert "| seeds | 3 | 2 | 2 |" in beside.table({"seeds": [4, 5, 6], "rates": [0.2]}, tmp_path)


def test_documented_scores_are_those_of_the_records():
    root = pathlib.Path(beside.__file__).parents[1]
    page = (root / "docs" / "comparison.md").read_text()
    table = page.partition("## Trained on the same pairs")[2].partition("##")[0]
    out = root / "studies" / "photographs" / "beside_open_clip"
    lines = beside.table(json.loads((out / "settings.json").read_text()), out).splitlines()
    cells = {"| ".join(line.split("| ")[2:5]) for line in lines}
    shown = [line for line in table.splitlines() if "[" in line and line.startswith("|")]
    assert len(shown) == 7 and all("| ".join(line.split("| ")[2:]).rstrip("|") in cells for line in shown)

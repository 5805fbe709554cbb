"""Each example as its users run it, only shorter."""

import functools
import json
import pathlib
import re

import chex
import jax
import numpy as np
import pytest
import scipy.stats

from examples import clusters, compare_objectives, exchanged, finetune_pairs, mix, study, swapped_shapes, use_a_model
from tests.helpers import tiny
from tests.helpers.foreign import our_model
from xclip_jax import interop
from xclip_jax.config import load
from xclip_jax.core.errors import UserError
from xclip_jax.data import images, sources
from xclip_jax.data.config import DataConfig
from xclip_jax.models.transformer import stack_blocks
from xclip_jax.train import trainer, weights

pytestmark = pytest.mark.long


def test_use_a_model(run, tmp_path, capsys):
    tiny.folder(tmp_path / "pictures", 2)
    images = [str(tmp_path / "pictures" / f"{i:03d}.png") for i in range(2)]
    use_a_model.main([str(run), *images, "--classes", "fox,hen"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "embeddings of 16 numbers" and len(lines) == 1 + 3 * 2
    assert "something to eat" in lines[1] and "cluster " in lines[-1]
    assert lines[3].startswith(f"{images[0]}: ") and "%" in lines[3]


def test_swapped_shapes(tmp_path, capsys):
    swapped_shapes.main([str(tmp_path)])
    assert "left of" in capsys.readouterr().out
    config = DataConfig((f"parquet:{tmp_path / 'train.parquet'}",), negatives=2, text_columns=("caption",),
                        negative_columns=("negatives",))  # fmt: skip
    (source,) = sources.open_sources(config)
    record = source[0]
    (right,) = record["text"]
    words = [sorted(text.split()) for text in (right, *record["negatives"])]
    assert len({right, *record["negatives"]}) == 3 and words[0] == words[1] == words[2]
    assert images.decode(record["image"]).shape == (32, 32, 3)


def test_swapped_shapes_needs_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit):
            swapped_shapes.main(arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # minutes of training
def test_finetune_pairs(tmp_path, capsys):
    finetune_pairs.main(["--folder", str(tmp_path), "--given-steps", "200", "--steps", "60"])
    *_, last = lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| (all|adapters)", line)]
    results = {(way, float(share)): (float(new), float(old)) for way, share, new, old, *_ in rows}
    assert len(results) == 1 + 2 * 4
    assert results["all weights", 1][1] < results["all weights", 0][1]  # it forgets
    open_clip, transformers = (float(x) for x in re.findall(r"at most ([0-9.e-]+)", last))
    assert open_clip < 1e-5 and transformers < 1e-3  # whose processor resizes with torchvision, and rounds


@pytest.mark.slow  # two runs
def test_mix(pairs, tmp_path, capsys):
    """The initial weights are of an earlier step, lack the projections, and have stacked blocks and cut positions."""
    source = tmp_path / "source"
    data = {"data__sources": (f"folder:{pairs}",), "optim__lr": 0.01, "model__img__depth": 2}
    trainer.run(tiny.config("nclip", run=source, steps=2, checkpoint__every=1, checkpoint__keep=2, **data))
    (source / "checkpoints" / "2").rename(tmp_path / "later")
    c = tiny.config("clip", run=tmp_path / "run", steps=2, init__weights=str(source), model__scan=True, **data)
    c.model.txt.context_length -= 2
    trainer.run(c)
    (tmp_path / "later").rename(source / "checkpoints" / "2")
    given = jax.device_get(weights.load(str(source), 1).variables["params"])
    tuned = jax.device_get(weights.load(c.run).variables["params"])
    before = given["img"] | {"transformer": stack_blocks(given["img"]["transformer"], 2)}
    assert "proj_img" not in given and np.abs(tuned["txt"]["tokens"] - given["txt"]["tokens"]).max() > 1e-3
    for share in (0, 0.25, 1):
        mix.main([c.run, str(share), str(tmp_path / "mixed")])
        mixed = interop.read(str(tmp_path / "mixed"))[1]["params"]
        expected = jax.tree.map(lambda a, b, share=share: (1 - share) * a + share * b, before, tuned["img"])
        chex.assert_trees_all_close(mixed["img"], expected, rtol=0, atol=0 if share in (0, 1) else 1e-6)
        positions = (1 - share) * given["txt"]["positions"][:-2] + share * tuned["txt"]["positions"]
        np.testing.assert_allclose(mixed["txt"]["positions"], positions, rtol=0, atol=1e-6)
        chex.assert_trees_all_equal(mixed["proj_img"], tuned["proj_img"])
    assert "not in this run: " in capsys.readouterr().out
    assert weights.load(str(tmp_path / "mixed")).step == 0
    for run, share in ((source, 0.5), (c.run, 1.5)):
        with pytest.raises(UserError, match=r"init\.weights is empty|expected a number from 0 to 1"):
            mix.mix(str(run), share, str(tmp_path / "none"))


def test_mix_leaves_initial_weights_and_files_of_other_programs(tmp_path):
    config, variables = our_model("clip")
    for to in ("hf", "safetensors"):
        interop.write(variables, config, str(tmp_path / to), to)
    same = {"data__tokenizer": "clip", "model__img__heads": 1, "model__txt__heads": 1}
    run = tiny.untrained(tmp_path / "run", "clip", init__weights=str(tmp_path / "safetensors"), **same)
    for out, message in (
        ("hf", "other files, such as .*config.json"),
        ("safetensors", "has the initial weights of .*run"),
    ):
        before = {file: file.read_bytes() for file in (tmp_path / out).iterdir()}
        with pytest.raises(UserError, match=message):
            mix.mix(str(run), 0.5, str(tmp_path / out))
        assert {file: file.read_bytes() for file in (tmp_path / out).iterdir()} == before


def narrow(load_config):
    """The same config with towers that compile in a second."""

    def narrowed(spec):
        config = load_config(spec)
        for tower in (config.model.img, config.model.txt):
            tower.width, tower.depth, tower.heads = 16, 1, 2
        config.model.cluster_head.clusters = config.model.cluster_head.hidden = 32
        return config

    return narrowed


def notebook_cells(name="quickstart"):
    notebook = json.loads((pathlib.Path(__file__).parents[1] / f"docs/notebooks/{name}.ipynb").read_text())
    return [("".join(cell["source"]), cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_notebooks_are_kept_without_outputs():
    for path in (pathlib.Path(__file__).parents[1] / "docs/notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_notebook_installs_from_what_is_named(tmp_path, monkeypatch):
    install, _ = notebook_cells()[0]
    asked = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, **options: asked.append(command[-1]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no checkout around this notebook: set SOURCE above"):
        exec(install, {})
    for source in ("git+https://host/lab/x", "x-1.0-py3-none-any.whl"):
        assert install.count('SOURCE = "../.."\n') == 1
        exec(install.replace('SOURCE = "../.."\n', f'SOURCE = "{source}"\n'), {})
    assert asked == ["xclip_jax[demo] @ git+https://host/lab/x", "x-1.0-py3-none-any.whl[demo]"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # Jupyter shows the picture
def test_the_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load_config", narrow(load.load_config))
    (install, _), *cells = notebook_cells()
    assert install.count("STEPS = 200\n") == 1
    names = {}
    exec(install.replace("STEPS = 200\n", "STEPS = 2\n"), names)
    for source, _ in cells:
        exec(source, names)
    assert (len(names["known"]), len(names["unseen"])) == (67, 13)
    assert not set(names["known"]) & set(names["unseen"])
    assert names["results"]["zeroshot/folder:shapes/test/n"] == 52
    assert names["z_img"].shape[0] == names["z_txt"].shape[0] == 6
    assert capsys.readouterr().out.count("%)\n") == 6
    assert (tmp_path / "runs/quickstart/report.html").exists()


@pytest.mark.slow  # four runs
def test_compare_objectives(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare_objectives, "load_config", narrow(load.load_config))
    flags = ["--steps", "1", "--batch", "16", "--objectives", "clip,nclip", "--suite", "emoji/test_aliases"]
    compare_objectives.main([*flags, "--runs", str(tmp_path)])
    said = capsys.readouterr().out
    assert "95 % interval" in said and f"B: {tmp_path}/nclip-1" in said
    assert not list(tmp_path.glob("*/report.html"))
    assert json.loads((tmp_path / "clip-1" / "config.json").read_text())["config"]["eval"]["report"] is False


@pytest.mark.slow
def test_study(tmp_path, pairs, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from tests.helpers import tiny\n\n\ndef get_config(arg=None):\n"
        f"    keys = {{'optim__warmup': 0, 'data__sources': ('folder:{pairs}',)}}\n"
        "    return tiny.config('clip', steps=1, optim__lr=float(arg), **keys)\n"
    )
    flags = ["--a", f"{recipe}:0.01", "--b", f"{recipe}:0.1", "--sets", "tests.extension.greys:Greys/20"]
    flags += ["--seeds", "0,1", "--runs", str(tmp_path / "runs")]
    study.main(flags)
    first = capsys.readouterr().out.rpartition("\nA: ")[2]
    assert "Greys/20 nearer |" in first and " of 2 |" in first
    assert len(list((tmp_path / "runs").glob("[ab]-s[01]/results.json"))) == 4
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.jsonl")}
    study.main(flags)
    assert capsys.readouterr().out.rpartition("\nA: ")[2] == first
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())  # finished runs are not repeated
    with pytest.raises(UserError, match="--seeds 0,0 has one seed; an interval needs at least two"):
        study.main(["--seeds", "0,0"])
    with pytest.raises(UserError, match="--seeds is '0-4'; expected numbers"):
        study.main(["--seeds", "0-4"])


def test_a_study_pairs_differences_by_seed():
    a, b = ({seed: {"top1": value} for seed, value in enumerate(side)} for side in ((1.0, 2.0, 4.0), (2.0, 2.5, 7.0)))
    expected = scipy.stats.ttest_rel((2.0, 2.5, 7.0), (1.0, 2.0, 4.0)).confidence_interval()
    text = f"| top1 | 2.3 | 3.8 | +1.5 [{expected.low:+.1f}, {expected.high:+.1f}] | 3 of 3 |"
    assert text in study.table(a, b | {9: {"top1": 99.0}})


def test_headers_name_their_command():
    for path in pathlib.Path(use_a_model.__file__).parent.glob("[a-z]*.py"):
        text = path.read_text()
        command = "__main__" in text  # superclip.py is a term that a config names
        assert (f"python -m examples.{path.stem}" in text.split('"""')[1]) == command


def test_clusters_need_both_regularisers():
    information = {
        name: clusters.train(*weights, steps=80)[1][-1]["mutual_information_img"]
        for name, weights in clusters.SETTINGS.items()
    }
    assert information["no regulariser"] < 0.2 and information["smoothness only"] < 0.2
    assert 0.5 < information["sharpness only"] < 1.4 and information["both"] > 2


def test_the_contrastive_term_keeps_details():
    nclip, xclip = (clusters.compare(name, steps=300) for name in ("nclip", "xclip"))
    assert xclip[0] > nclip[0] + 0.2  # things are told apart
    assert min(nclip[2], xclip[2]) > 2  # and both have the places as clusters


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # Jupyter shows the picture
def test_the_notebook_of_clusters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    *training, drawing, _ = (source for source, _ in notebook_cells("clusters"))
    names = {}
    for source in training:
        exec(source, names)
    assert capsys.readouterr().out.count("place in cluster") == len(clusters.PLACES)
    assert len(set(names["best"]["img"].tolist())) >= 10
    monkeypatch.setattr(clusters, "train", functools.partial(clusters.train, steps=2))
    monkeypatch.setattr(clusters, "compare", functools.partial(clusters.compare, steps=2))
    exec(drawing, names)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["information.png", "words.png"]
    first = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert first == [*clusters.SETTINGS, "clip", "nclip", "xclip"]


def test_exchanged(tmp_path, capsys):
    folder = tiny.folder(tmp_path / "pairs", 40)
    plain = sources.open_pairs(f"folder:{folder}")
    mixed = sources.open_pairs(f"examples.exchanged:Exchanged:0.25/folder:{folder}")
    texts = [[source[i]["text"] for i in range(40)] for source in (plain, mixed)]
    wrong = [i for i in range(40) if texts[0][i] != texts[1][i]]
    assert wrong == sorted(mixed.exchanged) and len(wrong) == 10 and sorted(texts[0]) == sorted(texts[1])
    assert all(plain[i]["image"] == mixed[i]["image"] and plain[i]["id"] == mixed[i]["id"] for i in range(40))
    assert plain.fingerprint()["hash"] != mixed.fingerprint()["hash"]
    scores = np.random.default_rng(0).permutation(40) / 40 + 0.005
    lines = [{"source": "hash:text", "index": i, "probability": scores[i]} for i in np.argsort(scores).tolist()]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = str(tmp_path / "wrong.jsonl")
    exchanged.main([f"examples.exchanged:Exchanged:0.25/folder:{folder}", str(tmp_path / "all.jsonl"), "--out", out])
    right = [i for i in range(40) if i not in wrong]
    auc = np.mean([[scores[i] < scores[j] for j in right] for i in wrong])
    assert (
        f"exchanged captions: 10 of 40; found before the others with an AUC of {auc:.1%}\n" in capsys.readouterr().out
    )
    assert sorted(line["index"] for line in map(json.loads, pathlib.Path(out).read_text().splitlines())) == wrong
    with pytest.raises(UserError, match=r"0\.25/demo:train"):
        sources.open_pairs(f"examples.exchanged:Exchanged:folder:{folder}")

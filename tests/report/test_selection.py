"""Which sets and pairs a report shows."""

import numpy as np

from tests.helpers import tiny
from xclip_jax.commands import report as command
from xclip_jax.core.errors import UserError
from xclip_jax.data import holdout, sources
from xclip_jax.data.config import DataConfig
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.zeroshot import ZeroShotSet
from xclip_jax.report import examples, selection


def test_selected_sets(monkeypatch):
    loaded = []

    def load(spec, size, data_dir, profile=None, data=None):
        loaded.append(spec)
        if spec == "imagenet":
            raise UserError("imagenet is not prepared.")
        images = [np.zeros((4, 4, 3), np.uint8)] * 3
        if "retrieval" in spec:
            return selection.RetrievalSet(spec, images, [["a"]] * 3)
        return ZeroShotSet(spec, images, np.arange(3), [[f"{c} {i}" for i in range(4000)] for c in "abc"])

    monkeypatch.setattr(selection.registry, "load", load)
    specs = ["imagenet", "probe/cifar10", "folder:x", "sts12@y", "coco_retrieval"]
    selected = selection.select(specs, Preprocessing(4), None, None, 0)
    assert set(loaded) == {"imagenet", "folder:x", "coco_retrieval"} and selected.missing == [
        "imagenet is not prepared."
    ]
    assert [title for title, *_ in selected.zeroshot] == ["folder:x"] and selected.retrieval[0].name == "coco_retrieval"
    assert sum(map(len, selected.zeroshot[0][2].prompts)) == selection.PROMPTS and not selected.credits
    loaded.clear()
    selected = selection.select(
        ["emoji/test_line", "emoji/test_probe", "emoji/test_concepts", "emoji/test_rendering_rest"],
        Preprocessing(4),
        None,
        None,
        0,
    )
    assert [zeroshot.name for _, _, zeroshot, _ in selected.zeroshot] == [
        "emoji/test_concepts",
        "emoji/test_line",
    ] and selected.credits
    assert "emoji/test_rendering_rest" not in loaded


def test_training_pairs_are_those_that_the_run_learned_from(tmp_path, monkeypatch):
    """With a share of the pairs, and captions exchanged by the run's seed; the report's seed only draws."""
    spec = f"folder:{tiny.folder(tmp_path / 'pairs')}"
    changes = {"data__subset": 0.5, "data__caption_noise": 0.5, "seed": 3}
    run = tiny.untrained(tmp_path / "run", "clip", data__sources=(spec,), **changes)
    selected = []
    monkeypatch.setattr(examples, "select", lambda *args: selected.append(selection.select(*args)) or selected[0])
    command.main([str(run), "--seed", "5"])
    data = DataConfig(sources=(spec,), subset=0.5, caption_noise=0.5, batch=8)
    (trained,) = holdout.apply_controls(sources.open_sources(data), data, 3)
    view = Preprocessing(selection.SHOWN)
    expected = {view(record["image"]).tobytes(): record["text"] for record in map(trained.__getitem__, range(20))}
    _, shown = selected[0].retrieval
    assert {image.tobytes(): texts for image, texts in zip(shown.images, shown.captions, strict=True)} == expected

"""Which sets a report shows."""

import numpy as np

from xclip_jax.core.errors import UserError
from xclip_jax.data.preprocessing import Preprocessing
from xclip_jax.evaluators.zeroshot import ZeroShotSet
from xclip_jax.report import choose_examples


def test_selected_sets(monkeypatch):
    loaded = []

    def load(spec, size, data_dir, profile=None, data=None):
        loaded.append(spec)
        if spec == "imagenet":
            raise UserError("imagenet is not prepared.")
        images = [np.zeros((4, 4, 3), np.uint8)] * 3
        if "retrieval" in spec:
            return choose_examples.RetrievalSet(spec, images, [["a"]] * 3)
        return ZeroShotSet(spec, images, np.arange(3), [[f"{c} {i}" for i in range(4000)] for c in "abc"])

    monkeypatch.setattr(choose_examples.registry, "load", load)
    specs = ["imagenet", "probe/cifar10", "folder:x", "sts12@y", "coco_retrieval"]
    selected = choose_examples.select(specs, Preprocessing(4), None, None)
    assert set(loaded) == {"imagenet", "folder:x", "coco_retrieval"}
    assert selected.missing == ["imagenet is not prepared."]
    assert [title for title, *_ in selected.zeroshot] == ["folder:x"] and selected.retrieval[0].name == "coco_retrieval"
    assert sum(map(len, selected.zeroshot[0][2].prompts)) == choose_examples.PROMPTS
    assert not selected.kinds[0].display.credit
    loaded.clear()
    specs = [f"emoji/test_{name}" for name in ("line", "probe", "concepts", "rendering_rest")]
    selected = choose_examples.select(specs, Preprocessing(4), None, None)
    assert [zeroshot.name for _, _, zeroshot, _ in selected.zeroshot] == ["emoji/test_concepts", "emoji/test_line"]
    assert selected.kinds[0].display.credit
    assert "emoji/test_rendering_rest" not in loaded


def test_a_set_whose_folder_has_moved_is_named_and_the_others_are_shown(monkeypatch):
    monkeypatch.setattr(
        choose_examples.registry, "load", lambda spec, *_, **__: choose_examples.RetrievalSet(spec, [], [])
    )
    selected = choose_examples.select(["retrieval/moved", "coco_retrieval"], Preprocessing(4), None, None)
    assert "'moved'" in selected.missing[0] and selected.retrieval[0].name == "coco_retrieval"

"""Benchmarks with a folder or a file that is kept: what an earlier run left there takes no part in the next."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from benchmarks import embed, kernel, loader, plans
from xclip_jax.core import storage


@pytest.fixture
def small_pictures(monkeypatch):
    monkeypatch.setattr(loader, "picture", lambda rng: rng.bytes(20))


def test_tars_are_those_of_this_run(tmp_path):
    assert len(storage.expand(loader.write(tmp_path, [b"image"], 25, 10))) == 3
    tars = storage.expand(loader.write(tmp_path, [b"image"], 12, 10))
    assert tars == [str(tmp_path / f"0000{i}.tar") for i in range(2)]
    assert storage.expand(loader.write(tmp_path, [b"image"], 10, 10)) == tars[:1]


def test_images_are_those_of_this_run(tmp_path, small_pictures):
    embed.write(tmp_path, 1002)
    own = tmp_path / "images" / "own.jpg"
    own.touch()
    embed.write(tmp_path, 1001)
    paths = embed.paths(tmp_path, 1001)
    assert len(paths) == 1001 and paths == sorted(paths)
    assert {str(path) for path in tmp_path.rglob("*.jpg")} - set(paths) == {
        str(own),
        str(tmp_path / "images" / "001" / "001001.jpg"),
    }


def test_embeddings_are_those_of_the_last_run(tmp_path):
    for time, n in ((1_700_000_000_000_000_000, 3), (1_700_000_000_000_000_009, 2)):
        rows = pa.FixedSizeListArray.from_arrays(pa.array(np.full(4 * n, n, np.float32)), 4)
        pyarrow.parquet.write_table(pa.table({"embedding": rows}), tmp_path / f"ours-{time}.parquet")
    np.testing.assert_array_equal(embed.embeddings(tmp_path), np.full((2, 4), 2))


def test_the_kernel_and_its_gradient_move_queries_keys_values_and_outputs_once_each():
    pytest.importorskip("libtpu")
    forward, backward = kernel.compiled("v5e", (64, 4, 16, 13, 128, True))
    assert (forward.name, backward.name) == ("attention", "attention_gradient")
    bias, array = 4 * 3 * 128, 2 * 4 * 16 * 128
    assert (forward.bytes, backward.bytes) == (4 * array + bias, 8 * array + 2 * bias)
    other, _ = kernel.compiled("v5e", (64, 4, 16, 13, 128, False))
    assert forward != other and forward.operands == other.operands  # their code differs


def test_the_page_has_the_plans_that_are_known(tmp_path, monkeypatch):
    plan = {"fits": True, "chips": 32, "hosts": 8, "steps": 9, "capacity": 16 * 2**30, "peak_ms": 80.1, "mfu": 0.39}
    plan |= {"memory": {"peak": 2**33}, "sent": {"all-reduce": 2**20, "all-gather": 2**20}, "chip_hours": 1680}
    plan |= {"roofline": {"ms": 199.2, "exposed_ms": 6.9, "hbm_ms": 72.9}, "pairs_per_second": 2e4}
    plan |= {"images_per_second_per_host": 2500}
    monkeypatch.setattr(plans, "planned", lambda *_, **__: plan)
    monkeypatch.setattr(plans, "DOCS", tmp_path)
    plans.main(["v5e:4x8", "objective=xclip", "zero1"])
    too_large = {key: plan[key] for key in ("chips", "hosts", "steps", "capacity", "peak_ms")} | {"fits": False}
    monkeypatch.setattr(plans, "planned", lambda *_, **__: too_large)
    plans.main(["v5e:4x8", "objective=xclip", "fsdp"])
    page = (tmp_path / "plans.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("##")] == ["## preset=B/16,batch=4096 on v5e:4x8"]
    assert "| xclip | zero1 | 8.00 | 2 | 199.2 | 6.9 | 72.9 | 39% | 20,000 | 2,500 | 1,680 | " in page
    assert "| xclip | fsdp over 8 | does not fit |" in page


def test_plans_are_made_once_by_the_same_sources_recipes_and_versions(tmp_path, monkeypatch):
    made, versions, recipe = [], {}, tmp_path / "configs" / "recipe.py"
    recipe.parent.mkdir()
    recipe.write_text("STEPS = 1")
    monkeypatch.setattr(plans, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(plans, "planned", lambda *_, **__: made.append("a plan") or {"fits": True})
    monkeypatch.setattr(plans.environment, "_version", lambda name: versions.get(name, "1.0"))

    def plans_made():
        made.clear()
        planner = plans.Planner(tmp_path / "plans.json")
        planner(("pretrain:objective=clip,preset=B/16", "v5e:2x4", {}))
        return len(made)

    assert [plans_made(), plans_made()] == [1, 0]
    recipe.write_text("STEPS = 2")
    assert [plans_made(), plans_made()] == [1, 0]
    for name in ("jax", "libtpu"):
        versions[name] = "2.0"
        assert [plans_made(), plans_made()] == [1, 0]

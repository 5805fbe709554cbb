"""Plans: their page, and when they are made again."""

from benchmarks import plans


def test_the_page_has_the_plans_that_are_known(tmp_path, monkeypatch):
    plan = {"fits": True, "chips": 32, "hosts": 8, "steps": 9, "capacity": 16 * 2**30, "peak_ms": 80.1, "mfu": 0.39}
    plan |= {"memory": {"peak": 2**33}, "sent": {"all-reduce": 2**20, "all-gather": 2**20}, "chip_hours": 1680}
    plan |= {"roofline": {"ms": 199.2, "exposed_ms": 6.9, "hbm_ms": 72.9}, "pairs_per_second": 2e4}
    plan |= {"images_per_second_per_host": 2500, "step_ms": 206.1}
    monkeypatch.setattr(plans, "planned", lambda _: plan)
    monkeypatch.setattr(plans, "DOCS", tmp_path)
    plans.main(["v5e:4x8", "objective=xclip", "zero1"])
    too_large = {key: plan[key] for key in ("chips", "hosts", "steps", "capacity", "peak_ms")} | {"fits": False}
    monkeypatch.setattr(plans, "planned", lambda _: too_large)
    plans.main(["v5e:4x8", "objective=xclip", "fsdp"])
    plans.main(["v5e:4x8", "L/14"])
    page = (tmp_path / "plans.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("##")]
    assert headings == ["## Sizes and chips", "## preset=B/16,batch=4096 on v5e:4x8"]
    assert "| xclip B/16 | 206.1 ms, 39%, 72.9 ms | - | - | - |" in page
    assert "| clip L/14 | does not fit | - | - | - |" in page
    assert "| xclip | zero1 | 8.00 | 2 | 199.2 | 6.9 | 72.9 | 39% | 20,000 | 2,500 | 1,680 | " in page
    assert "| xclip | fsdp over 8 | does not fit |" in page


def test_plans_are_made_once_by_the_same_sources_recipes_and_versions(tmp_path, monkeypatch):
    made, versions, recipe = [], {}, tmp_path / "configs" / "recipe.py"
    recipe.parent.mkdir()
    recipe.write_text("STEPS = 1")
    monkeypatch.setattr(plans, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(plans, "planned", lambda _: made.append("a plan") or {"fits": True})
    monkeypatch.setattr(plans.environment, "_version", lambda name: versions.get(name, "1.0"))

    def plans_made():
        made.clear()
        planner = plans.Planner(tmp_path / "plans.json")
        planner(("pretrain:objective=clip,preset=B/16", "v5e:2x4", {}))
        return len(made)

    assert [plans_made(), plans_made()] == [1, 0]
    recipe.write_text("STEPS = 2")
    assert [plans_made(), plans_made()] == [1, 0]
    versions["libtpu"] = "2.0"
    assert [plans_made(), plans_made()] == [1, 0]

"""The pages in docs/: commands that exist, in one form, and code that a reader on GitHub has before them."""

import pathlib
import re
import types

import jax
import numpy as np
import pytest
from PIL import Image

import xclip_jax
from docs import pictures
from tests.helpers import tiny
from xclip_jax import main as cli
from xclip_jax.commands import embed
from xclip_jax.config import load, recipes, schema
from xclip_jax.data import embeddings

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    f"model.{tower}.{name}": n for tower in ("img", "txt") for name, n in (("depth", 1), ("heads", 2), ("width", 64))
}
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if not path.stem.startswith("study")]
MODULES = "|".join(rf"xclip_jax\.commands\.{name}" for name in cli.COMMANDS)


def names(paths):
    return [path.relative_to(ROOT).as_posix() for path in paths]


@pytest.mark.parametrize("name", [*names(PAGES), "README.md", "docs/notebooks/quickstart.ipynb"])
def test_recipes_of_the_package_go_by_name(name):
    text = (ROOT / name).read_text()
    assert not re.findall(r"--config[\s=]configs/\S+", text)
    given = re.findall(r"--config[\s=]([a-z]\w*)(?=[:\s`])", text)
    assert set(given) <= set(load.recipes())


@pytest.mark.parametrize("name", names(PAGES))
def test_commands_have_one_form(name):
    text = (ROOT / name).read_text()
    assert not re.findall(rf"python -m (?:{MODULES}) .*", text)
    assert set(re.findall(r"xclip-jax ([a-z]\w*)", text)) <= set(cli.COMMANDS)


@pytest.mark.parametrize("path", sorted((ROOT / "tests/extension").glob("[a-z]*.py")), ids=lambda path: path.name)
def test_the_pages_of_extensions_have_their_code_and_length(path):
    text = path.read_text()
    assert f"```python\n{text}```\n" in (ROOT / "docs" / "examples.md").read_text()
    anchor = f"[`{path.name}`](examples.md#{path.name.replace('.', '')}), {len(text.splitlines())} |"
    assert anchor in (ROOT / "docs" / "extend.md").read_text()


def test_pages_include_no_files():
    for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        assert "--8<--" not in path.read_text(), path


def test_anchors_of_links_are_those_of_github_and_of_the_site():
    """The site joins the hyphens that GitHub leaves of "a % of b", and numbers equal headings in another way."""
    texts = {
        path: re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
        for path in [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")]
    }
    for path, text in texts.items():
        for name, anchor in re.findall(r"\]\(([\w/.]*)#([^)]+)\)", text):
            headings = re.findall(r"^#+ +(.+)$", texts[(path.parent / name).resolve() if name else path], re.M)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors and anchor == re.sub("-+", "-", anchor).strip("-"), (path.name, name, anchor)


@pytest.mark.parametrize("name", ["docs/verdicts.md", "docs/photographs.md", "README.md"])
def test_intervals_of_the_answer_are_in_the_tables_of_the_studies(name):
    """A difference may be stated from either side."""

    def intervals(page):
        rows = re.findall(r"([+-]?\d+\.\d) \[([+-]?\d+\.\d),\s([+-]?\d+\.\d)\]", (ROOT / page).read_text())
        numbers = [tuple(map(float, row)) for row in rows]
        return {min((mean, low, high), (-mean, -high, -low)) for mean, low, high in numbers}

    stated = intervals(name)
    tables = ("docs/study.md", "docs/duel.md", "docs/photographs/tables.md")
    assert stated and stated <= set.union(*map(intervals, tables))


@pytest.mark.slow
def test_pictures_of_the_demo(tmp_path):
    runs = [tiny.untrained(tmp_path / name, name) for name in ("clip", "xclip")]
    pictures.comparison(list(map(str, runs)), tmp_path / "comparison.png")
    pictures.search(str(runs[1]), tmp_path / "search.png")
    for name, width in (("comparison", 1180), ("search", 1020)):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width == width and 700 < picture.height < 2100


@pytest.mark.long
def test_the_own_loop(tmp_path, monkeypatch, capsys):
    """Its blocks, one after the other, here of small towers on one device; the loop stays as short as the page says."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_loop.md").read_text(), re.DOTALL)
    lines = blocks[0].strip().splitlines()
    assert len(lines) <= 30 and len([line for line in lines if line.startswith("import")]) == 3
    assert blocks[0].count('keys = {"steps": 20,') == 1
    blocks[0] = blocks[0].replace("keys = {", f'keys = {SMALL} | {{"devices": jax.devices()[:1], ')
    monkeypatch.chdir(tmp_path)
    names = {"jax": jax}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"step \d+: loss (\S+)", printed)]
    assert losses[-1] < losses[0] and "['red', 'green', 'blue', 'white']" in printed


def test_a_recipe_takes_over_the_towers_of_weights():
    (code,) = re.findall(r"`(config\.model\.update\([^`]+)`", (ROOT / "docs" / "formats.md").read_text())
    saved = schema.resolve(tiny.config("siglip"))
    config = recipes.base("siglip", "B/16")
    exec(code, {"config": config, "model": types.SimpleNamespace(config=saved), "schema": schema})
    assert schema.resolve({"steps": 1, "optim": {"warmup": 0}, "model": config.model.to_dict()}).model == saved.model


@pytest.mark.slow
def test_the_vector_stores(run, tmp_path, monkeypatch, capsys):
    """Each program of the page, by itself, finds the images of the largest products, here in a folder of two shares."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shapes").symlink_to(run)
    tiny.folder(tmp_path / "photos", 20)
    for i in (1, 2):
        flags = ["--checkpoint=runs/shapes", "--images=photos", "--out=photos.parquet", f"--share={i}/2", "--batch=8"]
        embed.main(flags)
    photos, model = embeddings.read("photos.parquet"), xclip_jax.load("runs/shapes", batch=8)
    scores = photos["embedding"] @ model.encode_text(["a big red star"])[0]
    best = np.argsort(-scores)[:3]
    page = (ROOT / "docs/vectors.md").read_text()
    assert re.findall(r"## (FAISS|LanceDB|Qdrant)\n\n```python\n# pip", page) == ["FAISS", "LanceDB", "Qdrant"]
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        capsys.readouterr()
        exec(block, {})
        expected = [f"{scores[i]:.3f}  {photos['id'][i]}  {photos['text'][i]}" for i in best]
        assert capsys.readouterr().out.splitlines() == expected, block

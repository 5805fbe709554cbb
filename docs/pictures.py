"""Make the pictures of docs/ that show the demo: python -m docs.pictures CLIP XCLIP [FOLDER]

    xclip-jax train --config demo:objective=clip --config.run=runs/clip
    xclip-jax train --config demo --config.run=runs/xclip
    python -m docs.pictures runs/clip runs/xclip

Both runs are evaluated and shown side by side (comparison.png), the second one also alone (demo.png, strip.png) and
as a search page (search.png). Screenshots are made in Chromium, as in the tests.
"""

import functools
import io
import pathlib
import sys
import tempfile

from PIL import Image

from tests.helpers.browser import chromium, opened
from tests.helpers.serving import served
from xclip_jax.commands import evaluate, report
from xclip_jax.core.run_folder import RunReader
from xclip_jax.evaluators import registry
from xclip_jax.report import collect, page, picture
from xclip_jax.train.build import make_encoder
from xclip_jax.train.weights import load

COMPARED = "emoji/test_concepts,emoji/test_rendering,emoji/test_line,emoji/test_retrieval,emoji/test_aliases"
SIDE = 72  # of an image on the search page, pixels


def write(path: pathlib.Path, png: bytes) -> None:
    """Write a picture with 256 colours, a third of its size."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(path, optimize=True)


def comparison(runs: list[str], path: pathlib.Path) -> None:
    """Write the differences of two runs, and two rows of images with names by each."""
    for run in runs:
        evaluate.main(["--checkpoint", run, "--suite", COMPARED])
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        page_file = pathlib.Path(folder, "comparison.html")
        report.main([*runs, "--sets", COMPARED, "--output", str(page_file)])
        with opened(browser, page_file.as_uri(), width=1180) as page:
            top = page.locator("#differences-h").bounding_box()["y"] - 24
            last = page.locator("#names article").nth(5).bounding_box()
            clip = {"x": 0, "y": top, "width": 1180, "height": last["y"] + last["height"] + 8 - top}
            write(path, page.screenshot(full_page=True, clip=clip))


def search(run: str, path: pathlib.Path) -> None:
    """Write the search page: images for a text, and labels for the first of them."""
    pairs = registry.load("emoji/test_retrieval", SIDE)
    with tempfile.TemporaryDirectory() as images, tempfile.TemporaryDirectory() as cache, chromium() as browser:
        for i, (image, captions) in enumerate(zip(pairs.images, pairs.captions, strict=True)):
            Image.fromarray(image).save(f"{images}/{i:03d}.png")
            pathlib.Path(images, f"{i:03d}.txt").write_text(captions[0])
        with served(run, images, cache) as address, opened(browser, address, width=1020) as page:
            page.get_by_label("What the images should show").fill("red heart")
            page.get_by_role("button", name="Search").click()
            page.locator("#matches button").first.click()
            page.locator("#best li").nth(9).wait_for()
            page.mouse.move(0, 0)
            page.evaluate("scrollTo({top: 0, behavior: 'instant'})")
            answer = page.locator(".answer").bounding_box()
            clip = {"x": 0, "y": 0, "width": 1020, "height": answer["y"] + answer["height"] + 24}
            write(path, page.screenshot(full_page=True, clip=clip))


def strip(run: str, path: pathlib.Path) -> None:
    """Write 1280 x 360 pixels: four images with names, then the first search and the largest cluster."""
    config = collect.read(run).config
    loaded = load(run)
    experiment = loaded.experiment
    variables = loaded.variables
    specs = (*config.eval.sets_at_end, *config.eval.sets)
    encoder = make_encoder(experiment)
    examples = page.predict(experiment, encoder, variables, specs, config=config)
    if examples.clusters is None:
        raise ValueError(f"{run} has no clusters; use a run of the demo with xclip or nclip")
    named = picture.best_first(examples.named)[0]
    cells = [
        functools.partial(picture.search_card, examples.gallery, result=examples.searches[0]),
        functools.partial(picture.cluster_card, examples.gallery, cluster=examples.clusters.most[0]),
    ]
    cell = functools.partial(picture.name_card, named.num_classes)
    rows = picture.grid(named.guesses[: picture.CARDS], picture.CARDS, picture.NAME_HEIGHT, cell)
    rows += picture.grid(cells, 2, picture.CLUSTER_HEIGHT, lambda row, x, width, draw: draw(row, x, width))
    # A margin of 18 makes 450 pixels of 1600, which are 360 of 1280; each grid has a gap below its cards.
    picture.save(path, [picture.Row(18), *rows], width=1280)


def main(clip: str, xclip: str, to: str = "docs") -> None:
    """Write the four pictures to a folder."""
    folder = pathlib.Path(to)
    comparison([clip, xclip], folder / "comparison.png")
    search(xclip, folder / "search.png")
    strip(xclip, folder / "strip.png")
    write(folder / "demo.png", RunReader(xclip).picture_file.read_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])

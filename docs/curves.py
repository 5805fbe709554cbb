"""Make the pictures of docs/curves.md: python -m docs.curves [FOLDER [WORK]]

Draws 4,000 scenes of two coloured shapes with captions into WORK (runs/curves), trains four runs on them by the recipe
`small`, and takes charts of their reports in Chromium. It takes ten minutes on two cores.
"""

import io
import itertools
import math
import pathlib
import random
import subprocess
import sys

from PIL import Image, ImageDraw

from tests.helpers.browser import chromium, opened

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "pink")
SIDES = {"triangle": 3, "square": 4, "pentagon": 5, "circle": 60}
PAIRS = 4000
SIZE = "steps=400,size=48"
EVALUATION = "Evaluation during training"
RUNS = {  # run: (folder, objective, flags, charts)
    "healthy": ("pairs", "xclip", (), ("CLIP loss", "Mutual information", EVALUATION)),
    "flat": (
        "pairs",
        "nclip",
        ("--config.objective.nclip.sharpness=0.2",),
        ("nCLIP loss", "Mutual information", EVALUATION),
    ),
    "diverged": ("pairs", "clip", ("--config.optim.lr=0.5",), ("CLIP loss", "Gradient norm", EVALUATION)),
    "wrong": ("shifted", "clip", (), ("CLIP loss", "Accuracy within the batch", EVALUATION)),
}


def scene(number: int) -> tuple[Image.Image, str]:
    """Draw a scene of two shapes on a grey ground, 48 x 48 pixels, and describe it."""
    rng = random.Random(number)
    things = rng.sample(sorted(itertools.product(COLOURS, SIDES)), 2)
    ground = rng.randint(180, 250)
    image = Image.new("RGB", (144, 144), (ground,) * 3)
    pen = ImageDraw.Draw(image)
    for left, (colour, shape) in zip((36, 108), things, strict=True):
        x, y = left + rng.uniform(-8, 8), rng.uniform(40, 104)
        turn, size = rng.uniform(0, 2 * math.pi), rng.uniform(20, 30)
        angles = [turn + 2 * math.pi * i / SIDES[shape] for i in range(SIDES[shape])]
        pen.polygon([(x + size * math.cos(a), y + size * math.sin(a)) for a in angles], fill=colour)
    first, second = (" ".join(thing) for thing in things)
    return image.resize((48, 48), Image.Resampling.LANCZOS), f"a {first} and a {second}"


def draw(folder: pathlib.Path, shift: int) -> None:
    """Write the scenes with their captions, or with those of `shift` scenes later."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = [scene(number)[1] for number in range(PAIRS)]
    for number in range(PAIRS):
        scene(number)[0].save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(captions[(number + shift) % PAIRS])


def photograph(report: pathlib.Path, charts: tuple[str, ...], to: pathlib.Path) -> None:
    """Write charts of a report side by side."""
    with chromium() as browser, opened(browser, report.as_uri(), width=1180) as page:
        page.add_style_tag(content="nav { position: static !important }")  # it would cover charts
        figures = [page.locator("figure.chart").filter(has=page.get_by_text(name, exact=True)) for name in charts]
        shots = [Image.open(io.BytesIO(figure.first.screenshot())) for figure in figures]
    whole = Image.new("RGB", (sum(shot.width for shot in shots), max(shot.height for shot in shots)), "white")
    left = 0
    for shot in shots:
        whole.paste(shot, (left, 0))
        left += shot.width
    whole.quantize(256).save(to, optimize=True)


def main(to: str = "docs/curves", work: str = "runs/curves") -> None:
    """Draw the data, train the runs, and write a picture of each."""
    folder = pathlib.Path(work)
    draw(folder / "pairs", 0)
    draw(folder / "shifted", 1)
    for name, (pairs, objective, flags, charts) in RUNS.items():
        recipe = f"small:pairs={folder / pairs},objective={objective},{SIZE}"
        command = ["-m", "xclip_jax.main", "train", "--config", recipe, f"--config.run={folder / name}", *flags]
        subprocess.run([sys.executable, *command], check=True)
        photograph((folder / name / "report.html").absolute(), charts, pathlib.Path(to, f"{name}.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Two tables of drawings, each with its caption and two wrong ones: python -m examples.swapped_shapes FOLDER.

A drawing shows two shapes. The negatives of "a red ring left of a blue cross" exchange colours or sides. The page
docs/finetune.md trains on FOLDER/train.parquet and tests on FOLDER/test.parquet.
"""

import argparse
import io
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image, ImageDraw

from xclip_jax.core.errors import exit_with_message
from xclip_jax.core.outputs import check_folder

SIZE = 32  # pixels
COLORS = {
    "red": (220, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 220), "yellow": (240, 210, 20),
    "black": (10, 10, 10), "pink": (250, 130, 190), "grey": (140, 140, 140), "brown": (130, 80, 30),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
Thing = tuple[str, str]  # colour and shape


def draw(things: tuple[Thing, Thing], rng: np.random.Generator) -> bytes:
    """Return a PNG of the things side by side, at random heights, in random sizes and shades."""
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(picture)
    for (color, shape), middle in zip(things, (SIZE // 4, 3 * SIZE // 4), strict=True):
        x = middle + int(rng.integers(-1, 2))
        y = SIZE // 2 + int(rng.integers(-5, 6))
        r = int(rng.integers(5, 8))
        box = (x - r, y - r, x + r, y + r)
        fill = tuple(int(v) for v in np.clip(np.array(COLORS[color]) + rng.integers(-20, 21, 3), 0, 255))
        if shape == "circle":
            pen.ellipse(box, fill)
        elif shape == "square":
            pen.rectangle(box, fill)
        elif shape == "triangle":
            pen.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill)
        elif shape == "cross":
            pen.line(box, fill, 3)
            pen.line((x - r, y + r, x + r, y - r), fill, 3)
        else:
            pen.ellipse(box, None, fill, 2)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def caption(left: Thing, right: Thing) -> str:
    """Return "a red ring left of a blue cross"."""
    return f"a {' '.join(left)} left of a {' '.join(right)}"


def rows(n: int, seed: int) -> list[dict[str, object]]:
    """Return n rows with columns image (bytes), caption, and negatives (a list)."""
    rng = np.random.default_rng(seed)
    things = list(itertools.product(COLORS, SHAPES))
    pairs = [(a, b) for a in things for b in things if a[0] != b[0] and a[1] != b[1]]
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=n)]
    return [
        {
            "image": draw((a, b), rng),
            "caption": caption(a, b),
            "negatives": [caption((b[0], a[1]), (a[0], b[1])), caption(b, a)],
        }
        for a, b in chosen
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="folder for train.parquet and test.parquet")
    folder = pathlib.Path(check_folder("folder", parser.parse_args(argv).folder))
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, n) in enumerate((("train", 3000), ("test", 300))):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(n, seed)), folder / f"{name}.parquet")
    print({key: value for key, value in rows(1, 0)[0].items() if key != "image"})


if __name__ == "__main__":
    with exit_with_message():
        main()

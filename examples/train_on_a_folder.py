"""Trains a small model on a folder of images and captions of your own, on a laptop, and looks at what it learned.

    python -m examples.train_on_a_folder ~/pairs --run runs/mine

Each image has a .txt file of the same name beside it, one caption a line. A thousand pairs take about five minutes on
two cores; --epochs says how long. It is configs/pretrain.py with towers for a laptop; on an accelerator take that as it
is: python -m xclip_jax.main --config configs/pretrain.py:preset=B/16 --config.data.sources='("folder:PATH",)'.
The same command again goes on where it was cut off.
"""

import argparse
import sys
from collections.abc import Sequence

import ml_collections
import numpy as np

import xclip_jax
from configs import pretrain
from xclip_jax import trainer
from xclip_jax.data.sources import FolderSource
from xclip_jax.errors import UserError


def get_config(
    folder: str, run: str, *, objective: str, epochs: int, batch: int, size: int, tokenizer: str
) -> ml_collections.ConfigDict:
    """configs/pretrain.py, with what a laptop needs changed."""
    pairs = len(FolderSource(folder))
    batch = min(batch, pairs)
    config = pretrain.get_config(f"objective={objective},preset=Ti/12,batch={batch},pairs={pairs},epochs={epochs}")
    config.run = run
    config.data.sources = (f"folder:{folder}",)
    config.data.tokenizer = tokenizer
    config.data.threads = 2
    config.model.img.size, config.model.txt.length = size, 32
    for tower in (config.model.img, config.model.txt):
        tower.scan, tower.remat = False, "none"
    config.model.cluster_head = {"clusters": 1024, "hidden": 512, "layers": 1, "last_norm": False}
    config.model.dtype = "float32"
    config.optim.lr = 1e-3
    config.checkpoint.every = 200
    return config


def main(argv: Sequence[str] | None = None) -> None:
    """The example; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="images and .txt files")
    parser.add_argument("--run", default="runs/mine", help="folder of the run")
    parser.add_argument("--objective", default="xclip", help="clip, siglip, nclip or xclip")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=96, help="side of an image, pixels; a multiple of 12")
    parser.add_argument("--tokenizer", default="clip", help="clip, bytes or a file")
    options = vars(parser.parse_args(argv))
    trainer.run(get_config(**options))

    model = xclip_jax.load(options["run"])
    source = FolderSource(options["folder"])
    some = np.random.default_rng(0).permutation(len(source))[:100]
    pairs = [source[i] for i in some]
    scores = model.encode_image([p["image"] for p in pairs]) @ model.encode_text([p["text"][0] for p in pairs]).T
    right = scores.argmax(axis=1) == np.arange(len(pairs))
    # Pairs that were trained on: this says that something was learned, not how well it carries over.
    print(f"of {len(pairs)} images {right.mean():.0%} find their own caption among {len(pairs)}")
    print(f"use it: python -m examples.use_a_model {options['run']} IMAGE ...")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")

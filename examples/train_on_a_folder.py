"""Trains a small model on a folder of images and captions of your own, on a laptop, and looks at what it learned.

    python -m examples.train_on_a_folder ~/pairs --run runs/mine

Each image has a .txt file of the same name beside it, one caption a line. A thousand pairs take about five minutes on
two cores; --epochs says how long. It is configs/pretrain.py with towers for a laptop; on an accelerator take that as it
is: python -m xclip_jax.main --config configs/pretrain.py:preset=B/16 --config.data.sources='("folder:PATH",)'.
The same command again goes on where it was cut off.
"""

import argparse
import contextlib
from collections.abc import Sequence

import ml_collections
import numpy as np

import xclip_jax
from xclip_jax.configs import pretrain
from xclip_jax.data.folder_source import FolderSource
from xclip_jax.errors import BadSample, exit_with_message
from xclip_jax.evaluators.retrieval import positives, ranks
from xclip_jax.train import trainer


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
    config.data.spread_duplicate_captions = (
        True  # captions of one's own often repeat; in one batch they would be wrong negatives
    )
    config.data.threads = 2
    config.model.img.image_size, config.model.txt.context_length = size, 32
    for tower in (config.model.img, config.model.txt):
        tower.scan, tower.remat = False, "none"
    config.model.cluster_head.update({"clusters": 1024, "hidden": 512, "layers": 1, "last_norm": False})
    config.model.dtype = "float32"
    config.optim.lr = 1e-3
    config.checkpoint.every = 200
    return config


def verdict(scores: np.ndarray, texts: list[str]) -> str:
    """How many of n images find their own text, in a sentence; equal texts count as right, as in evaluations.

    Args:
      scores: (n, n), of images against texts.
      texts: of each image.
    """
    matches = positives([[text] for text in texts])  # (n, n)
    right, distinct = (ranks(scores, matches) < 1).mean(), len(set(texts))
    blind = matches.mean(axis=0).max()  # of the most frequent text as the only answer
    sentence = f"of {len(texts)} images {right:.0%} find their own caption among {distinct}; chance is {blind:.1%}"
    if distinct < len(texts):
        sentence += " (the most frequent caption), and 100% can be reached, since equal captions count as right"
    return sentence


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
    images, texts = [], []
    for i in np.random.default_rng(0).permutation(len(source)):
        with contextlib.suppress(BadSample):  # training skips and lists them
            record = source[i]
            images.append(model.prepare(record["image"]))
            texts.append(record["text"][0])
        if len(images) == 100:
            break
    # Pairs that were trained on: this says that something was learned, not how well it carries over.
    print(verdict(model.encode_prepared(images) @ model.encode_text(texts).T, texts))
    print(f"use it: python -m examples.use_a_model {options['run']} IMAGE ...")


if __name__ == "__main__":
    with exit_with_message():
        main()

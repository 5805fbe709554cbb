"""Captions as long as those of CC12M, and what texts in groups of their lengths save of a step's FLOPs.

    python -m benchmarks.captions

Captions of CC12M have 20.2 tokens on average, with a standard deviation of 16.3 (Changpinyo et al. 2021, arXiv
2102.08981, table 1). No more of their distribution is published there; lengths are drawn from the log-normal
distribution with these moments, which is skewed as they are, with two more tokens for start and end, and cut at 77.
"""

import math

import numpy as np

from xclip_jax.config import recipes
from xclip_jax.config.schema import resolve
from xclip_jax.data import length_groups
from xclip_jax.models.tower import TextTower
from xclip_jax.train import cost

CONTEXT = 77
_MEAN, _DEVIATION = 20.2, 16.3
_DEVICES = 32


def lengths(n: int, seed: int = 0) -> np.ndarray:
    """Tokens of `n` captions, int (n,), with start and end."""
    variance = math.log(1 + (_DEVIATION / _MEAN) ** 2)
    words = np.random.default_rng(seed).lognormal(math.log(_MEAN) - variance / 2, variance**0.5, n)
    return np.minimum(np.maximum(words.round(), 1).astype(int) + 2, CONTEXT)


def tokens(ends: np.ndarray, context: int, vocab: int, seed: int = 0) -> np.ndarray:
    """Random int32 tokens (n, context) of texts that end, with the largest token, after `ends` of them; then zeros."""
    rows = np.random.default_rng(seed).integers(1, vocab - 2, (len(ends), context), np.int32)
    rows[:, 0] = vocab - 2
    rows[np.arange(len(ends)), ends - 1] = vocab - 1
    return np.where(np.arange(context) < ends[:, None], rows, 0)


def groups_for(rows: int, draws: int, tower: TextTower) -> length_groups.LengthGroups:
    """What `data.length_groups=auto` chooses for such captions, on devices of `rows` rows."""
    counts = np.bincount(lengths(1024), minlength=CONTEXT + 1)
    return length_groups.choose(counts, rows=rows, draws=draws, flops_of=tower.cut_flops)


def main() -> None:
    """Print a line for each preset: groups, mean length, and the share of a step's FLOPs that is saved."""
    drawn = lengths(1_000_000)
    quantiles = ", ".join(f"{q:.0%} {np.quantile(drawn, q):.0f}" for q in (0.25, 0.5, 0.75, 0.9, 0.99))
    full = np.mean(drawn == CONTEXT)
    print(f"tokens of a caption: mean {drawn.mean():.1f}; {quantiles}; {full:.1%} fill all {CONTEXT}")
    print("CLIP\n")
    for rows in (128, 1024):
        for preset in ("B/32", "B/16", "L/14"):
            base = recipes.base("clip", preset)
            base.steps, base.data.batch, base.run = 1, rows * _DEVICES, "runs/none"
            config = resolve(base)
            groups = groups_for(rows, _DEVICES, config.model.txt)
            saved = 1 - cost.step_flops(config, groups) / cost.step_flops(config)
            mean = groups.mean(lambda n: n, CONTEXT)
            print(
                f"{preset}, {rows} pairs on each of {_DEVICES} devices: data.length_groups={groups}, {mean:.1f} of "
                f"{CONTEXT} positions are computed; a step's FLOPs fall by {saved:.1%}"
            )


if __name__ == "__main__":
    main()

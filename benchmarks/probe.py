"""The linear probe against scikit-learn: the same features, the same sweep of C, the same machine, in turns.

    pip install '.[bench]' && JAX_PLATFORMS=cpu python -m benchmarks.probe [--size small]

Both times include compiling and choosing C by validation accuracy. Both stop when no component of the gradient exceeds
`--tolerance` (default of scikit-learn 1e-4, of our evaluators 1e-5) or after 1000 iterations. The whole sweep of
xclip_jax runs before, between and after scikit-learn's, which goes from C to C. Sizes: full is 50,000 x 512 features of
100 classes and 20 C, small 5,000 x 128 of 20 and 20.
"""

import argparse
import time
import warnings

import jax
import numpy as np
import sklearn
from sklearn.linear_model import LogisticRegression

from xclip_jax.evaluators import logistic

SIZES = {"full": (50_000, 512, 100, 20), "small": (5_000, 128, 20, 20)}


def features(n: int, d: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features (n, d) of overlapping classes, on axes that shrink like a tower's, and labels (n,)."""
    # More axes need nearer centres: otherwise classes would not overlap, and all C would be equally good.
    centres = 4 / np.sqrt(d) * np.random.default_rng(99).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return ((centres[y] + rng.normal(size=(n, d))) * np.geomspace(1, 0.1, d)).astype(np.float32), y


def main() -> None:
    """Print a line for each turn, then both times and how far the accuracies agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--turns", type=int, default=3, help="of xclip_jax, around scikit-learn's")
    flags = parser.parse_args()
    n, d, classes, count = SIZES[flags.size]
    x, y = features(n, d, classes, 0)
    held, labels = features(5000, d, classes, 1)
    cs = 10.0 ** np.linspace(-4, 4, count)
    print(
        f"{n} x {d}, {classes} classes, {count} C, tolerance {flags.tolerance:g}, "
        f"jax {jax.__version__} on {jax.devices()[0]}, scikit-learn {sklearn.__version__}"
    )
    ours = []
    theirs = 0.0
    scores = np.zeros(count)
    peers = []
    for part in [*np.array_split(cs, max(flags.turns - 1, 1)), cs[:0]][: max(flags.turns, 1)]:
        jax.clear_caches()  # each turn counts its compilation
        began = time.perf_counter()
        fitted = logistic.fit(x, y, cs, classes, tolerance=flags.tolerance)
        scores = (fitted.logits(held).argmax(axis=2) == labels).mean(axis=1)
        ours.append(time.perf_counter() - began)
        print(f"xclip_jax     {ours[-1]:8.1f} s   all {count} C", flush=True)
        for c in part:
            began = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peers.append(LogisticRegression(C=c, tol=flags.tolerance, max_iter=1000).fit(x, y).score(held, labels))
            took = time.perf_counter() - began
            theirs += took
            print(f"scikit-learn  {took:8.1f} s   C {c:.1e}, {100 * peers[-1]:.2f} %", flush=True)
    median = float(np.median(ours))
    print(f"xclip_jax     {median:8.1f} s (median of {len(ours)})   best {100 * scores.max():.2f} %")
    print(f"scikit-learn  {theirs:8.1f} s   best {100 * max(peers):.2f} %")
    difference = 100 * np.abs(scores - peers).max()
    print(f"{theirs / median:.1f} times faster; the accuracies at one C differ by at most {difference:.2f} points")


if __name__ == "__main__":
    main()

"""The linear probe against scikit-learn: the same features, the same sweep of C, one after the other.

    python benchmarks/probe.py [--n 50000 --d 512 --classes 100 --cs 20]

Both count compiling and choosing C by validation accuracy; scikit-learn runs with tol 1e-4, its default, and
max_iter 1000, CLIP's.
"""

import argparse
import time
import warnings

import jax
import numpy as np
import sklearn
from sklearn.linear_model import LogisticRegression

from xclip_jax.evaluators import logistic


def features(n: int, d: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes along axes whose lengths fall as those of a tower's features do."""
    centres = 0.35 * np.random.default_rng(99).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return ((centres[y] + rng.normal(size=(n, d))) * np.geomspace(1, 0.1, d)).astype(np.float32), y


def main() -> None:
    """Prints one row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("n", 50_000), ("d", 512), ("classes", 100), ("cs", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    flags = parser.parse_args()
    x, y = features(flags.n, flags.d, flags.classes, 0)
    held, wanted = features(5000, flags.d, flags.classes, 1)
    cs = 10.0 ** np.linspace(-4, 4, flags.cs)
    print(f"{flags.n} x {flags.d}, {flags.classes} classes, {flags.cs} C, jax {jax.__version__} on {jax.devices()[0]}, "
          f"scikit-learn {sklearn.__version__}")
    began = time.perf_counter()
    scores = (logistic.fit(x, y, cs, flags.classes).logits(held).argmax(axis=2) == wanted).mean(axis=1)
    print(f"xclip_jax     {time.perf_counter() - began:8.1f} s   best {100 * scores.max():.2f} %", flush=True)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = [LogisticRegression(C=c, max_iter=1000).fit(x, y).score(held, wanted) for c in cs]
    print(f"scikit-learn  {time.perf_counter() - began:8.1f} s   best {100 * max(scores):.2f} %")


if __name__ == "__main__":
    main()

"""Cost of refusing steps whose loss or gradient is not finite: the same step with the condition and without.

    JAX_PLATFORMS=cpu python -m benchmarks.guard --recipe studies/icons/recipe.py --rounds 160

Both steps are compiled in one process and taken in turn on one random batch. Prints the median seconds of each and last
"ratio R", the median over rounds of the guarded step's time over the other's. Set GLIBC_TUNABLES as launch/common.sh
does.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from xclip_jax.config.load import load_config
from xclip_jax.parallel.mesh import batch_sharding
from xclip_jax.train import build, state
from xclip_jax.train import step as train_step


def make_step(recipe: str) -> Callable[[], float]:
    """Compile a step of a recipe; the result takes one and returns its loss."""
    config = load_config(recipe)
    config.run = "unused"
    experiment = build.build(config)
    rng, size, length = np.random.default_rng(0), experiment.image_size, experiment.context_length
    text = rng.integers(1, experiment.tokenizer.eot_id, (experiment.config.data.batch, length), np.int32)
    text[:, -1] = experiment.tokenizer.eot_id
    image = rng.integers(0, 256, (experiment.config.data.batch, size, size, 3), np.uint8)
    batch = {k: jax.device_put(x, batch_sharding(experiment.mesh)) for k, x in (("image", image), ("text", text))}
    current = [state.create(experiment.init, experiment.abstract)]

    def step() -> float:
        current[0], metrics = experiment.compiled(current[0], batch)
        return float(metrics["loss"])

    step()
    return step


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="studies/icons/recipe.py", help="as of --config (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=160, help="steps of each (default: %(default)s)")
    flags = parser.parse_args()
    steps = {"guarded": make_step(flags.recipe)}
    with mock.patch.object(train_step, "all_finite", lambda *_: jnp.asarray(True)):  # the compiler drops the condition
        steps["without"] = make_step(flags.recipe)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(flags.rounds):
        for name in sorted(steps, reverse=bool(i % 2)):
            began = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - began)
    for name, values in seconds.items():
        print(f"{name:<8} {statistics.median(values):.4f} s a step")
    print(f"ratio {statistics.median(map(lambda a, b: a / b, seconds['guarded'], seconds['without'])):.4f}")


if __name__ == "__main__":
    main()

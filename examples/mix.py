"""Mix the weights of a fine-tuned run with those that it started from (WiSE-FT, https://arxiv.org/abs/2109.01903).

    python -m examples.mix runs/tuned 0.5 mixed
    xclip-jax evaluate --checkpoint mixed --suite retrieval/holdout@runs/tuned,imagenet_v2
    xclip-jax evaluate --checkpoint runs/tuned --suite retrieval/holdout@runs/tuned,imagenet_v2
    xclip-jax evaluate --compare runs/tuned mixed
    xclip-jax export --checkpoint mixed --to open_clip mixed-open_clip

The mix is 0.5 times the initial weights plus 0.5 times the run's own: 0 gives the initial weights, 1 the run's.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xclip_jax import interop
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError, exit_with_message
from xclip_jax.core.outputs import check_folder
from xclip_jax.core.run_folder import RunReader
from xclip_jax.train import weights


def mix(run: str, share: float, out: str) -> None:
    """Write (1 - share) * initial + share * tuned weights into the folder `out`, in xclip_jax's own format.

    The initial weights, `init.weights` of the run, are read and converted as at its start. Tensors that they lack stay
    tuned.

    Args:
      run: the run's folder.
      share: share of the tuned weights, from 0 to 1.
      out: the folder to write, new or of an earlier mix.
    """
    check_folder("the folder of the mix", out, lambda: interop.has_own(out))  # before the work
    if not 0 <= share <= 1:
        raise UserError(f"the share of the tuned weights is {share:g}; expected a number from 0 to 1.")
    config, experiment, variables, _, classes = weights.load(run)
    initial = config.init.weights
    if not initial:
        raise UserError(f"{run} did not start from other weights (init.weights is empty), so there is nothing to mix.")
    start = pathlib.Path(initial).expanduser().resolve()
    if pathlib.Path(out).expanduser().resolve() in (start, start.parent if start.is_file() else start):
        raise UserError(f"{out!r} has the initial weights of {run}, which a mix would replace; name another folder.")
    record = RunReader(run).read_config() or {}
    if "init_commit" in record:  # a branch of the Hub may have moved since
        initial = f"{initial.partition('@')[0]}@{record['init_commit']}"
    config = dataclasses.replace(config, init=dataclasses.replace(config.init, weights=initial))
    tensors, _ = weights.read_initial(config, experiment.abstract, classes, record.get("init_step"))
    tuned = flatten_dict(jax.device_get(dict(variables)), sep="/")
    mixed = {
        name: np.float32(1 - share) * tensors[name] + np.float32(share) * x if name in tensors and share < 1 else x
        for name, x in tuned.items()
    }
    interop.write(unflatten_dict(mixed, sep="/"), schema.to_dict(experiment.config), out, classes=classes)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="folder of a run with init.weights")
    parser.add_argument("share", type=float, help="share of the run's own weights, from 0 to 1")
    parser.add_argument("out", help="folder to write")
    flags = parser.parse_args(argv)
    mix(flags.run, flags.share, flags.out)
    print(f"written: {flags.out}")


if __name__ == "__main__":
    with exit_with_message():
        main()

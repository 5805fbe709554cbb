"""Train a model: xclip-jax train --config RECIPE[:a=1,b=2] [--config.KEY=VALUE ...].

RECIPE is the name of a recipe of the package, such as demo, or the path of a file.
"""

import logging as python_logging

from absl import app, flags

from xclip_jax import report
from xclip_jax.config import load
from xclip_jax.core import environment, errors, imports
from xclip_jax.core.console import log0
from xclip_jax.parallel import compiler
from xclip_jax.processes import runtime
from xclip_jax.train import callbacks, prepare, trainer

_CHECK = flags.DEFINE_bool(
    "check",
    False,
    "Check keys and names of the config, and stop; needs no run folder, and no data or devices except for recipes that "
    "read them, such as small and finetune.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the processes of other hosts, which JAX discovers on TPU pods, GKE and Slurm."
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, on other systems; with the next two.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "Number of processes.")
_PROCESS = flags.DEFINE_integer("process", -1, "Index of this process, from 0.")
flags.declare_key_flag("trust")  # for --help


def main(_: list[str]) -> None:
    """Run the trainer."""
    python_logging.getLogger("jax._src.xla_bridge").setLevel("WARNING")  # JAX warns of an unused GPU or TPU
    with runtime.exits(), errors.exit_with_message(), imports.trusting(load.TRUST.value):
        errors.end_at_once()  # until the run handles signals
        if _CHECK.value:
            config = prepare.check_names(flags.FLAGS.config)
            callbacks.check_names(config, installed=False)
            log0("the config, and the names of its sources and evaluation sets, are valid")
            extras = prepare.extras(config)
            if extras:
                log0(f"extras: {','.join(extras)}")  # launch/common.sh reads it
            log0("not checked: data, weights and disk; xclip-jax doctor does that")
            return
        runtime.join(_DISTRIBUTED.value, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        compiler.enable_cache()
        trainer.run(flags.FLAGS.config, [report.callback()], uptime=environment.uptime())


if __name__ == "__main__":
    app.run(main, flags_parser=load.parse)

"""Train a model: xclip-jax train --config RECIPE[:a=1,b=2] [--config.KEY=VALUE ...].

RECIPE is the name of a recipe of the package, such as demo, or the path of a file.
"""

import logging as python_logging

from absl import app, flags, logging

from xclip_jax import report
from xclip_jax.config import load
from xclip_jax.core import environment, errors, imports
from xclip_jax.core.console import log0
from xclip_jax.core.errors import exit_with_message
from xclip_jax.parallel import compiler
from xclip_jax.processes import runtime
from xclip_jax.train import callbacks, prepare, trainer

_CHECK = flags.DEFINE_bool(
    "check", False, "Check keys and names of the config, and stop: no data, no device and no run's folder are needed."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other hosts' processes: found by itself on TPU pods, GKE and Slurm."
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, elsewhere; with the next two.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", -1, "Which of them this one is, from 0.")


def main(_: list[str]) -> None:
    """Run the trainer."""
    logging.set_verbosity(logging.ERROR)
    python_logging.getLogger("jax._src.xla_bridge").setLevel("WARNING")  # JAX warns of an unused GPU or TPU
    with runtime.exits(), exit_with_message(), imports.trusting(load.TRUST.value):
        errors.end_at_once()  # until the run handles signals
        if _CHECK.value:
            config = prepare.check_names(flags.FLAGS.config)
            callbacks.classes(config)
            callbacks.tracker_classes(config)
            log0("the config, and the names of its sources and evaluation sets, are valid")
            if extras := prepare.extras(config):
                log0(f"extras: {','.join(extras)}")  # launch/common.sh reads it
            log0("not looked at: data, weights and disk; xclip-jax doctor does that")
            return
        runtime.join(_DISTRIBUTED.value, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        compiler.enable_cache(str(flags.FLAGS.config.run) if runtime.peers() else "")
        trainer.run(flags.FLAGS.config, [report.callback()], uptime=environment.uptime())


if __name__ == "__main__":
    app.run(main, flags_parser=load.parse)

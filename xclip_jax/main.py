"""Trains a model: python -m xclip_jax.main --config configs/demo.py [--config.KEY=VALUE ...]."""

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from xclip_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with its argument: FILE.py:a=1,b=2.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Set up jax.distributed: one process a host, as on a pod.")


def parse(argv: list[str]) -> list[str]:
    """Flags; a key or a file that does not exist is one sentence."""
    try:
        rest = flags.FLAGS(argv, known_only=False)
        if _CONFIG.value is None:
            raise UserError("--config is missing; start with --config configs/demo.py")
        return rest
    except (UserError, flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(f"error: {error.args[0] if error.args else error}")


def main(argv: list[str]) -> None:
    """Runs the trainer."""
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is no flag; keys are set as --config.KEY=VALUE")
    logging.set_verbosity(logging.WARNING)
    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    from xclip_jax import trainer

    try:
        trainer.run(_CONFIG.value)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)

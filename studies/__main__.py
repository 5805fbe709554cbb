"""Runs a study by its name: python -m studies photographs --list."""

import sys

from absl import logging

from studies.photographs import command as photographs
from xclip_jax.core.errors import UserError, exit_with_message

STUDIES = {"photographs": photographs.main}

if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    with exit_with_message():
        name = sys.argv[1] if len(sys.argv) > 1 else ""
        if name not in STUDIES:
            raise UserError(f"study {name!r} is unknown; run python -m studies NAME, NAME one of {', '.join(STUDIES)}.")
        STUDIES[name](sys.argv[2:])

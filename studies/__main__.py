"""Runs the study of photographs: python -m studies photographs --list."""

import sys

from absl import logging

from studies.photographs import command
from xclip_jax.core.errors import UserError, exit_with_message

if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    with exit_with_message():
        if sys.argv[1:2] != ["photographs"]:
            raise UserError("the study is missing or unknown; run python -m studies photographs.")
        command.main(sys.argv[2:])

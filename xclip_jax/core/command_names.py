"""The commands of the package by their names, and how messages write them."""

import sys

from xclip_jax.core.errors import Parser

COMMANDS = {
    "train": ("xclip_jax.main", "train a model by a recipe, or resume a run"),
    "evaluate": ("xclip_jax.commands.evaluate", "evaluate a run or weights of another project, or compare two runs"),
    "embed": ("xclip_jax.commands.embed", "write embeddings of images or texts to a file"),
    "export": ("xclip_jax.commands.export", "write weights for transformers, open_clip or safetensors"),
    "plan": ("xclip_jax.commands.plan", "show memory, traffic and time of a run before it is started"),
    "doctor": ("xclip_jax.commands.doctor", "check a run before it is started, or look at one by its folder"),
    "report": ("xclip_jax.commands.report", "write the page of a run"),
    "serve": ("xclip_jax.commands.serve", "search a folder of images by words on a page in the browser"),
    "check": ("xclip_jax.commands.check", "check image-text pairs before training"),
    "index": ("xclip_jax.data.readers.tar_index", "index tars ahead of a run"),
}


def command(name: str) -> str:
    """Return the command `name` as a user of this process types it: `xclip-jax NAME`, or `python -m xclip_jax NAME`."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    as_module = Parser.program is None and main is not None and main.name.startswith("xclip_jax.")
    return f"python -m xclip_jax {name}" if as_module else f"xclip-jax {name}"

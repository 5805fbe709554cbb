"""The pages' style sheets and scripts, files of this package that go into each page: no library, nothing fetched."""

import importlib.resources


def read(package: str, name: str) -> str:
    """Text of a file of `package`, a module's name."""
    return importlib.resources.files(package).joinpath(name).read_text("utf-8")


CSS = read("xclip_jax.report", "page.css")
SCRIPT = read("xclip_jax.report", "page.js")

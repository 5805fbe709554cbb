"""Recipes: the folder `configs` beside this package in a checkout; a wheel has that folder in place of this one."""

import pathlib

__path__ = [str(pathlib.Path(__file__).parents[2] / "configs")]

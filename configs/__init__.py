"""Recipes: each file has `get_config(arg) -> ConfigDict`. Its name selects it: `--config NAME:arg`."""

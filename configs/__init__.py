"""Recipes: each file has `get_config(arg) -> ConfigDict`. Imported as `xclip_jax.configs`, from a checkout too."""

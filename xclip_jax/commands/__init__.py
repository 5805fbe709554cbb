"""One module for each command of `xclip-jax`."""

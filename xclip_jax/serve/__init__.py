"""A search page for a folder of images, on this machine: python -m xclip_jax.serve."""

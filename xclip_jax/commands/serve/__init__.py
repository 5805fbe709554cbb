"""A search page for a folder of images, on this machine: xclip-jax serve."""

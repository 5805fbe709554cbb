"""Packages as somebody else would write them: they use xclip_jax and change nothing in it."""

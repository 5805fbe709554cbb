"""What is wrong with a run, before it is started and afterwards: xclip-jax doctor."""

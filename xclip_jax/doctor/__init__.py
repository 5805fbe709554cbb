"""What is wrong with a run, before it is started and afterwards: python -m xclip_jax.doctor."""

"""Evaluation sets: published ones, and your own in files, tars and folders."""

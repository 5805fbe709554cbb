"""Evaluation of a model: encoder, protocols, sets, results, tables."""

"""Studies: declared arms run with several seeds, and the tables, charts and verdicts made from their records.

The folder uses the package like an external package and is not installed with it; nothing imports it.
"""

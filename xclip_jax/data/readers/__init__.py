"""Readers of data at random access, one file for each kind of source."""

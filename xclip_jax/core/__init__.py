"""The ground floor: errors, files and storage, locks, config fields, console output."""

__version__ = "0.2.0"

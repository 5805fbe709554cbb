"""The ground floor: errors, files and storage, locks, config fields, console output."""

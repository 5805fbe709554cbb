"""Runs on many hosts: start, agreement, watchdog, signals."""

"""What keeps a run alive on many hosts: start, agreement, watchdog, signals."""

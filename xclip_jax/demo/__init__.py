"""The demo: emoji as image-text pairs, and its evaluation sets."""

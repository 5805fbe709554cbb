"""The config of a run: what a key is (`fields`), all keys (`schema`), and the command line (`load`)."""

"""The config of a run: all keys (`schema`), defaults for recipes (`recipes`), and the command line (`load`)."""

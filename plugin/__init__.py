"""The nbdkit plugin and the command: the only part that knows all the others."""

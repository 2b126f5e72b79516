"""Which weights have how many bits, the modules that hold them, and what it costs."""

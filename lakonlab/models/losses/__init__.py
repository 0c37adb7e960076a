"""Training losses, each a module that a config names as ``flow_loss``."""

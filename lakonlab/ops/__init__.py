"""Pure tensor functions: no state, no config."""

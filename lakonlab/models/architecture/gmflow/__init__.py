"""Students that answer with a Gaussian mixture, and the networks of GMFlow."""

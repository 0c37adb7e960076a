"""What is trained: diffusions, networks, losses, and the wholes that a config names."""

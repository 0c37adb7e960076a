"""Reading and writing files and checkpoints; knows nothing of models or training."""

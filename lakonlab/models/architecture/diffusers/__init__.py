"""Networks of the diffusers family: the ImageNet DiT in plain torch."""

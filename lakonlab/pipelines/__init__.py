"""Generation with the pipelines of diffusers and adapters of pi-Flow."""

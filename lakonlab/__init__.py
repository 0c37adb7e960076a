"""LakonLab: training flow and diffusion models and distilling them into few-step generators with pi-Flow."""

__version__ = '0.1.0'

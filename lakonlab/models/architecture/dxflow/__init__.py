"""Students that answer with a grid or polynomial of denoised images (DX)."""

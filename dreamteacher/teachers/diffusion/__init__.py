"""U-Nets of diffusion models in pixels: ADM, DDPM."""

"""U-Nets of latent diffusion: Stable Diffusion."""

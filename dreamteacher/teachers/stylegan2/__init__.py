"""StyleGAN2 and its checkpoints."""

"""What `speed.py` measures, in this order: the most telling ones first, as time may run out."""

# Teacher, images a step, torch.compile. A ResNet-50 at 256 px learns from each.
CONFIGURATIONS = [
    ("ADM-256", 32, "off"), ("ADM-256", 32, "on"), ("StyleGAN2-256", 64, "off"), ("StyleGAN2-256", 64, "on"),
    ("IC-GAN-256", 64, "off"), ("IC-GAN-256", 64, "on"), ("Stable Diffusion 1.x, KL", 32, "off"),
    ("Stable Diffusion 1.x, KL", 32, "on"), ("ADM-256", 128, "on"), ("ADM-256", 8, "off"),
    ("StyleGAN2-256", 256, "on"), ("IC-GAN-256", 256, "on"), ("Stable Diffusion 1.x, KL", 128, "on"),
]  # fmt: skip

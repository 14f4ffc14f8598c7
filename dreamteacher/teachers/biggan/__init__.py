"""BigGAN, BigBiGAN and IC-GAN."""

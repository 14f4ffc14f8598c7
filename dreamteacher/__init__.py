"""DreamTeacher: pretraining image backbones with deep generative models (ICCV 2023), an independent implementation."""

__version__ = "0.1.0"

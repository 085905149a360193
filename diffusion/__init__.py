"""Denoising diffusion models of satellite patches: data, process, model, training, evaluation, tracking."""

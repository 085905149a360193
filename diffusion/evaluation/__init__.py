"""Scores of samples: features, FID, KID, bits per dimension, pictures, and the job that computes them."""

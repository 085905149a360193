"""Scores of samples: FID, KID, bits per dimension, pictures, and the job that computes them."""

"""The networks that predict from a noisy image and its noise variance, and the moving average of their weights."""

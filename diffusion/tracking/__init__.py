"""MLflow: the run, its metrics exactly once, its images, the dataset, the model versions. Nothing here stalls training."""

"""The training job: batches by lanes, the loop, checkpoints, the journal."""

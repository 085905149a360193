"""The training job. A rank of it is `python -m diffusion.training.job FOLDER`."""

from diffusion.job import TrainingJob, run_job
from diffusion.training.loop import train

JOB = TrainingJob, train

if __name__ == "__main__":
    run_job(*JOB)

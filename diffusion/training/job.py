"""The training job. A rank of it is `python -m diffusion.training.job FOLDER`."""

from diffusion.jobs.rank import rank_main
from diffusion.jobs.specs import TrainingJob
from diffusion.training.loop import train_until

JOB = TrainingJob, train_until

if __name__ == "__main__":
    rank_main(*JOB)

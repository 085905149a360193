"""The training job: `torchrun … -m diffusion.training.job FOLDER`."""

from diffusion.job import run_job
from diffusion.training.loop import TrainingJob, train

if __name__ == "__main__":
    run_job(TrainingJob, train)

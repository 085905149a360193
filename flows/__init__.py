"""The workflow: the Prefect flow, its tasks, the jobs that they start, and what makes the command line convenient."""

"""Errors that a user can act on: each message says what is wrong, where, and what to do."""

from diffusion.trust.redaction import fit_to_leave


class UserError(Exception):
    """Something outside the code is wrong; trying again does not help until it has changed.

    What may change by itself is tried again: `flows/tasks/retrying.py`.
    """

    def __init__(self, message: str = "") -> None:
        # It goes to terminals, logs, pages and mails, and may repeat what the environment or an archive says.
        super().__init__(fit_to_leave(message))


class SettingsError(UserError):
    """A variable of the environment is misspelt, or has a value that it can't have."""


class DataError(UserError):
    """The source archive, a shard or a manifest is missing, damaged, or not what it claims to be."""


class RecipeError(UserError):
    """The recipe, or its combination with this machine, cannot be trained."""


class StoreError(UserError):
    """The object store cannot be reached, read or written."""


class StoreRefuses(StoreError):
    """The object store answers, and does not let these credentials do what is asked."""


class CheckpointDamaged(StoreError):
    """A checkpoint has a file that is missing or is not what was written: the store answers, but not with the checkpoint."""


class ClusterError(UserError):
    """The Ray cluster cannot be used: there is none, it is another one than needed, or it is too small."""


class TrackingError(UserError):
    """The MLflow server does not answer, or refuses."""


class RunBusy(UserError):
    """Another process is writing the same run."""


class TrainingDiverged(UserError):
    """The loss or the gradient became NaN or infinite."""


def nearest(name: str, valid: list[str]) -> str:
    """The end of a sentence that names the valid name closest to `name`, or all of them if none is close."""
    from difflib import get_close_matches

    close = get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid names: {', '.join(valid)}."

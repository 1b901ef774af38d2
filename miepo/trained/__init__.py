"""A trained policy to use: :func:`load` reads a run, a checkpoint or an exported folder."""

from miepo.trained.policy import TrainedPolicy, load
from miepo.trained.saved import Saved

__all__ = ["Saved", "TrainedPolicy", "load"]

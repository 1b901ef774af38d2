"""Supervised fine-tuning, the stage before the online one: imitate given responses, then merge and save a whole model.

The online stage takes the saved folder as its base, so that its reference, the network with the adapter off, is the
fine-tuned model. An adapter that is trained on top of another adapter has the model before both as its reference.
"""

from miepo.methods.sft.data import SupervisedDataModule
from miepo.methods.sft.module import SupervisedFineTuning

__all__ = ["SupervisedDataModule", "SupervisedFineTuning"]

"""Training: a frozen target teaches a drafter. No method and no family is named here."""

from speculens.training.config import Recipe, load_recipe
from speculens.training.parallel import disband
from speculens.training.trainer import encode, train

__all__ = ["Recipe", "disband", "encode", "load_recipe", "train"]

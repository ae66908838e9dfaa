"""Drafters: one file per method."""

from typing import TypeAlias

from speculens.drafters.base import Drafter, DraftSession, NoDrafter
from speculens.drafters.config import DrafterConfig
from speculens.drafters.eagle import EagleDrafter
from speculens.drafters.hivis import HivisDrafter
from speculens.drafters.lookup import LookupDrafter
from speculens.drafters.specvlm import SpecVLMDrafter
from speculens.drafters.vispec import ViSpecDrafter

# What every trained method is a kind of.
TrainedDrafter: TypeAlias = EagleDrafter

# Every trained method, by the `speculator_type` in its config. Adding a method adds its file and one line here.
METHODS: dict[str, type[TrainedDrafter]] = {
    drafter.name: drafter for drafter in (EagleDrafter, HivisDrafter, SpecVLMDrafter, ViSpecDrafter)
}

__all__ = [
    "METHODS",
    "DraftSession",
    "Drafter",
    "DrafterConfig",
    "EagleDrafter",
    "HivisDrafter",
    "LookupDrafter",
    "NoDrafter",
    "SpecVLMDrafter",
    "TrainedDrafter",
    "ViSpecDrafter",
]

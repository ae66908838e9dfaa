"""Drafters: one file per method."""

from speculens.drafters.base import Drafter, DraftSession, NoDrafter
from speculens.drafters.config import DrafterConfig
from speculens.drafters.eagle import EagleDrafter
from speculens.drafters.lookup import LookupDrafter

# Every trained method, by the `speculator_type` in its config. Adding a method adds its file and one line here.
METHODS: dict[str, type[EagleDrafter]] = {drafter.name: drafter for drafter in (EagleDrafter,)}

__all__ = ["METHODS", "Drafter", "DraftSession", "DrafterConfig", "EagleDrafter", "LookupDrafter", "NoDrafter"]

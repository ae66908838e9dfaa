"""Targets: any Hugging Face image-text-to-text model, frozen and unmodified."""

from speculens.targets.base import Prompt, Target, TargetSession
from speculens.targets.load import load_target, outline_target

__all__ = ["Prompt", "Target", "TargetSession", "load_target", "outline_target"]

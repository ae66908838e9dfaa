"""Drafter checkpoints on disk."""

from speculens.checkpoints.files import stored_bytes, whole
from speculens.checkpoints.ours import load_drafter, read_config, save_drafter
from speculens.checkpoints.published import LAYOUTS, save_published

__all__ = ["LAYOUTS", "load_drafter", "read_config", "save_drafter", "save_published", "stored_bytes", "whole"]

"""Drafter checkpoints on disk."""

from speculens.checkpoints.ours import load_drafter, read_config, save_drafter

__all__ = ["load_drafter", "read_config", "save_drafter"]

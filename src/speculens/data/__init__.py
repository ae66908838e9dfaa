"""Conversations to train on and to measure with."""

from speculens.data.sources import JsonLines, Listed, Source

__all__ = ["JsonLines", "Listed", "Source"]

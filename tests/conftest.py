"""One profile for all property tests: the same examples on every run, and no clock."""

from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")

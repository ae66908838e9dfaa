"""One profile for all property tests: the same examples on every run, and no clock. No test sees another's cache."""

import itertools

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch, tmp_path_factory):
    """The user's cache folder is an empty one of this test's own: costs of steps are learnt anew."""
    folder = tmp_path_factory.getbasetemp() / f"cache-{next(_numbers)}"
    folder.mkdir()  # torch keeps kernels there on a GPU, and warns where there is no folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))

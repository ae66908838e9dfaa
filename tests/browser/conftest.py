"""One browser and one stub for all tests; a fresh page and a fresh script for each."""

from __future__ import annotations

from importlib import import_module

import pytest
from stub import Script, Stub


@pytest.fixture(scope="session")
def driver():
    driver = import_module("chrome").start()  # here, not above: selenium may be missing
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def stub():
    stub = Stub()
    yield stub
    stub.shutdown()
    stub.server_close()


@pytest.fixture
def script(stub):
    """What the stub does in this test."""
    stub.script = Script()
    return stub.script


@pytest.fixture
def page(driver, stub, script):  # noqa: ARG001 - no page without a script
    page = import_module("chrome").Page(driver, stub.url)
    page.meet()
    return page

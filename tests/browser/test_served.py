"""The page against the server itself, with a small target of the testbed."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from urllib.request import urlopen

import pytest

pytest.importorskip("selenium", reason="selenium is missing: pip install '.[browser]'")
for part in ("speculens.server.run", "served"):
    pytest.importorskip(part, reason="the server is missing: pip install '.[serve]'", exc_type=ImportError)

TESTBED = Path(__file__).parents[2] / "testbed"
PICTURE = TESTBED / "heldout" / "pictures" / "bars-00.webp"
QUESTION = "Which of the team values is highest, and which lowest? Think step by step."


@pytest.fixture(scope="module")
def address():
    weights = TESTBED / "weights"
    with import_module("served").Served(weights / "llava", "--drafter", str(weights / "llava-eaglevlm")) as server:
        yield f"{server.url}/"


@pytest.fixture
def served(driver, address):
    page = import_module("chrome").Page(driver, address)
    page.wait(lambda: "eaglevlm" in page.text("#model"))
    return page


def running(address: str) -> int:
    with urlopen(f"{address}health") as answer:  # noqa: S310 - our own address
        return json.load(answer)["running"]


def test_a_picture_is_described_as_the_target_alone_would(served, address):
    served.hand_over("drop", (PICTURE.name, PICTURE.read_bytes()))
    served.wait(lambda: served.all("#pictures li"))
    served.find("#compare").click()
    served.ask(QUESTION)
    served.answered()
    assert not served.text("#error")
    told = served.find(".answer").get_property("textContent")
    assert len(told) > 20 and told[0] != " "
    assert served.all(".answer .kept") and served.all("#tree .node")
    assert "The two texts are equal" in served.text("#verdict")
    passes, passes_alone = (int(served.texts(f"{row} td")[2]) for row in ("#with", "#without"))
    assert passes < passes_alone
    assert int(served.find("#step").get_attribute("max")) == passes
    assert served.complaints() == []
    assert all(url.startswith((address, "data:", "blob:")) for url in served.requests())


def test_stop_frees_the_slot(served, address):
    served.ask(QUESTION)
    served.wait(lambda: served.text(".answer"))
    served.find("#stop").click()
    served.answered()
    served.wait(lambda: running(address) == 0)

"""The page against the server itself, with a small target of the testbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from urllib.request import urlopen

import pytest

pytest.importorskip("selenium", reason="selenium is missing: pip install 'speculens[browser]'")
pytest.importorskip(
    "speculens.server.run", reason="the server is missing: pip install 'speculens[serve]'", exc_type=ImportError
)

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "testbed" / "weights"
PICTURE = next((ROOT / "testbed" / "heldout" / "pictures").rglob("*.webp"), None)


@pytest.fixture(scope="module")
def address():
    command = ("serve", str(WEIGHTS / "llava"), "--drafter", str(WEIGHTS / "llava-eaglevlm"), "--port", "0", "--json")
    server = subprocess.Popen(
        [sys.executable, "-m", "speculens.cli", *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with server:
        yield json.loads(server.stdout.readline())["url"] + "/"
        server.send_signal(signal.SIGTERM)
    assert server.returncode == 0


@pytest.fixture
def served(driver, address):
    page = import_module("chrome").Page(driver, address)
    page.wait(lambda: "eaglevlm" in page.text("#model"))
    return page


def running(address: str) -> int:
    with urlopen(f"{address}health") as answer:  # noqa: S310 - our own address
        return json.load(answer)["running"]


def test_a_picture_is_described_as_the_target_alone_would(served, address):
    served.hand_over("drop", ("chart.webp", PICTURE.read_bytes()))
    served.wait(lambda: served.all("#pictures li"))
    served.find("#compare").click()
    served.ask("Describe the picture.")
    served.answered()
    assert not served.text("#error")
    assert len(served.text(".answer")) > 20
    assert served.all(".answer .kept") and served.all("#tree .node")
    assert "The two texts are equal" in served.text("#verdict")
    passes, passes_alone = (int(served.texts(f"{row} td")[2]) for row in ("#with", "#without"))
    assert passes < passes_alone
    assert int(served.find("#step").get_attribute("max")) == passes
    assert served.complaints() == []
    assert all(url.startswith((address, "data:", "blob:")) for url in served.requests())


def test_stop_frees_the_slot(served, address):
    served.ask("Describe the picture.")
    served.wait(lambda: served.text(".answer"))
    served.find("#stop").click()
    served.answered()
    served.wait(lambda: running(address) == 0)

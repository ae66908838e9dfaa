"""A real server for tests: the command itself in its own process, on a free port of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

ROOT = Path(__file__).parents[1]
NAME = "small"


class Served:
    """`speculens serve` with these arguments; leaves with the block. `log` is what it wrote to standard error."""

    def __init__(self, target: Path | str, *options: str) -> None:
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed in __exit__
        command = (sys.executable, "-m", "speculens", "serve", str(target), "--port", "0", "--json")
        self.process = subprocess.Popen(
            [*command, "--served-model-name", NAME, *options],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def __enter__(self) -> Self:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"the server did not start:\n{self.log}"
        self.url = json.loads(line)["url"]
        self.http = httpx.Client(base_url=self.url, timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout
            self.process.stdout.close()
            self._log.close()

    @property
    def log(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    @property
    def worker(self) -> psutil.Process:
        """The process that computes: the one that has torch, not multiprocessing's tracker of resources."""
        children = psutil.Process(self.process.pid).children()
        return max(children, key=lambda child: child.memory_info().rss)

    def ask(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=body(**fields))

    def until(self, status: str, seconds: float = 60) -> dict[str, Any]:
        """Wait for a word of /health."""
        return self.until_health(lambda health: health["status"] == status, seconds)

    def until_idle(self) -> dict[str, Any]:
        return self.until_health(lambda health: health["running"] == health["waiting"] == 0)

    def until_health(self, sound: Any, seconds: float = 60) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            health = self.http.get("/health").json()
            if sound(health):
                return health
            time.sleep(0.05)
        raise AssertionError(f"/health still says {health}\n{self.log}")


def body(question: str = "What is in the picture?", **fields: Any) -> dict[str, Any]:
    """A request for a few tokens."""
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 8,
        "temperature": 0,
        **fields,
    }

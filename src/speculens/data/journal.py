"""A file of rows that grows by whole lines: a process killed at any moment loses no row that was added."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from speculens.data.rows import Row, line
from speculens.errors import UserError

HEAD = b'{"id": '  # every row begins so: a file that holds nothing but a torn line is ours only if that does


class Journal:
    """Opens or makes the file, checks its rows, mends its end, holds the rows' ids, and adds rows.

    check  raises UserError for a row that no run of this kind has added
    A last line that was cut off while it was written is dropped. A file that holds anything else than our rows is
    refused and stays as it is. Only one process may hold a journal at a time.
    """

    def __init__(self, path: Path, check: Callable[[Row], None] = lambda _: None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._ids = self._mended(check)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)  # and with it the lock

    def __contains__(self, name: str | int) -> bool:
        return str(name) in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, row: Row) -> None:
        """Append a row, which begins with its id; when this returns, it is on the disk."""
        data = memoryview(line(row))
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)
        self._ids.add(str(row["id"]))

    def clear(self) -> None:
        """Forget every row."""
        os.ftruncate(self._descriptor, 0)
        os.fsync(self._descriptor)
        self._ids.clear()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process writes {self.path}: wait for it, or choose another output.") from None

    def _mended(self, check: Callable[[Row], None]) -> set[str]:
        """The ids of all rows. The file is touched only after the last of them has passed."""
        ids: set[str] = set()
        end, ended = 0, True
        with self.path.open("rb") as file:
            for number, data in enumerate(file, 1):
                row = _parsed(data)
                if row is None and (ids or HEAD.startswith(data[: len(HEAD)])) and not file.read(1):
                    break
                if not isinstance(row, dict) or "id" not in row:
                    raise UserError(f"Line {number} of {self.path} is no row of an earlier run: choose another output.")
                check(row)
                ids.add(str(row["id"]))
                end, ended = end + len(data), data.endswith(b"\n")
        os.ftruncate(self._descriptor, end)
        if not ended:
            os.write(self._descriptor, b"\n")
        return ids


def _parsed(data: bytes) -> Any:
    """None of a torn row: no part of an object is JSON, but the whole."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None

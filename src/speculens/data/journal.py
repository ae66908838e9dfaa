"""A file of rows that grows by whole lines: a process killed at any moment loses no row that was added."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, Self

from speculens.data.rows import Row, line
from speculens.errors import UserError


class Journal:
    """Opens or makes the file, mends its end, holds the rows' `metadata` by id, and adds rows.

    A last line that was cut off while it was written is dropped. Only one process may hold a journal at a time.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self.rows: dict[str, Any] = self._mend()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)  # and with it the lock

    def __contains__(self, name: str | int) -> bool:
        return str(name) in self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: Row) -> None:
        """Append a row; when this returns, it is on the disk."""
        data = memoryview(line(row))
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)
        self.rows[str(row["id"])] = row.get("metadata")

    def clear(self) -> None:
        """Forget every row."""
        os.ftruncate(self._descriptor, 0)
        os.fsync(self._descriptor)
        self.rows.clear()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process writes {self.path}: wait for it, or choose another output.") from None

    def _mend(self) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        end = 0
        with self.path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if not data.endswith(b"\n"):
                    break
                try:
                    row = json.loads(data)
                    rows[str(row["id"])] = row.get("metadata")
                except (ValueError, KeyError, TypeError, AttributeError):
                    if file.read(1):
                        raise UserError(
                            f"Line {number} of {self.path} is no row of an earlier run: choose another output."
                        ) from None
                    break
                end += len(data)
        os.ftruncate(self._descriptor, end)
        return rows

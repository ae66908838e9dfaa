"""Errors as OpenAI's clients know them."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200: one sentence, and which parameter is meant if one is."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else KINDS[400])
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer. ASCII: a message may quote what cannot be encoded."""
        headers = {"Retry-After": str(self.retry)} if self.retry is not None else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(json.dumps(self.body()), self.status, headers, "application/json")


def origin_of(error: BaseException) -> str:
    """File and line that raised an error: what a log may tell of it, for its message may quote the request."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "an unknown place"

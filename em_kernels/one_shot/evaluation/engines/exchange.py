"""One exchange with a server that speaks JSON over HTTP, and what can go wrong with it."""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any, NoReturn

# Answers that say that the same request may succeed later; all others below 500 say that it never will.
_TEMPORARY = (408, 409, 425, 429)
_SHOWN = 200


class UnavailableError(Exception):
    """The server gave no usable answer, but may give one to the same request later.

    Attributes:
        seconds: the time after which the server asks to be asked again; 0 where it does not say.
    """

    def __init__(self, reason: str, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.seconds = seconds


class RefusedError(Exception):
    """The server will never answer the request; the message has the status and the server's own reason."""


def post_json(url: str, body: dict[str, Any], *, key: str | None, timeout: float) -> dict[str, Any]:
    """Sends an object to a server and returns the object that the server answers with.

    Args:
        url: the address, http or https.
        body: what is sent.
        key: the key that the server asks for, or None.
        timeout: the seconds that the answer may take.

    Raises:
        UnavailableError: the server cannot be reached, is too slow or busy, or its answer is no JSON object.
        RefusedError: the server says that the request is wrong.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    deadline = time.monotonic() + timeout
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as response:
            answer = _read(response, deadline)
    except urllib.error.HTTPError as error:
        raise _of_status(error, deadline) from None
    except TimeoutError:
        raise UnavailableError(f"no answer within {timeout:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(_reason(error)) from None
    try:
        value = json.loads(answer)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UnavailableError(f"the answer is no JSON object: {_start(answer)}")
    return value


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses to go elsewhere: urllib would ask the other host by GET, and send it the key."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> NoReturn:
        fp.close()
        raise RefusedError(f"HTTP {code}, the server redirects to {newurl}")


def _read(response: Any, deadline: float) -> bytes:
    """The whole body; the limit of the socket alone would let a server send a byte at a time for ever."""
    parts = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


def _of_status(error: urllib.error.HTTPError, deadline: float) -> Exception:
    reason = f"HTTP {error.code}, {_own_reason(error, deadline) or error.reason}"
    if error.code in _TEMPORARY or error.code >= 500:
        after = error.headers.get("Retry-After") or ""
        return UnavailableError(reason, float(after) if after.isdecimal() else 0.0)
    return RefusedError(reason)


def _own_reason(error: urllib.error.HTTPError, deadline: float) -> str:
    """What the server says in the body of an error, in any of the forms that servers have for it."""
    try:
        body = _read(error, deadline)
    except (OSError, http.client.HTTPException):
        return ""
    try:
        value = json.loads(body)
    except ValueError:
        return _start(body)
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    return " ".join(str(value).split())[:_SHOWN]


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError):
        if isinstance(error.reason, TimeoutError):
            return "no connection within the time limit"
        reason = getattr(error.reason, "strerror", None) or str(error.reason)
        return f"no connection ({reason})"
    return f"the connection ended ({str(error) or type(error).__name__})"


def _start(body: bytes) -> str:
    text = " ".join(body.decode("utf-8", "replace").split())
    return repr(text[:_SHOWN])

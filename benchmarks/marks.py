"""The tables put marks behind names and numbers; this module says which, and what they mean."""

from collections.abc import Iterable

from stored_rows import Row

# An asterisk needs the backslash in Markdown.
_MEANINGS = {
    "\\*": "computes less, the cross entropy: one logit of a row and a normaliser, no sum over the distribution",
    "†": "gives statistics of each token, for any upstream gradient, and so makes four matmuls",
    "‡": "the host takes as long to launch it, or waits for the device in between: not the device's time alone",
}


def marks(rows: Iterable[Row]) -> str:
    """Return the marks that apply to at least one of the rows, one after the other."""
    found = {mark for row in rows for mark in _marks(row)}
    return "".join(mark for mark in _MEANINGS if mark in found)


def legend(text: str) -> str:
    """Return the sentence that explains the marks in `text`, or "" where there are none."""
    used = [f"{mark} {meaning}" for mark, meaning in _MEANINGS.items() if mark in text]
    return "; ".join(used) + "." if used else ""


def _marks(row: Row) -> list[str]:
    found = {
        "\\*": row.get("computes") == "cross entropy",
        "†": bool(row.get("per_token")),
        "‡": row.get("device") == "cuda" and row.get("host_seconds", 0) > row.get("seconds", 0) > 0,
    }
    return [mark for mark, holds in found.items() if holds]

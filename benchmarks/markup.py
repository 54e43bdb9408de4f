"""This module writes the Markdown and the numbers of the reports."""

from collections.abc import Iterable


def table(head: list[str], lines: Iterable[Iterable[str]]) -> str:
    """Return a table with a heading and a line for each of `lines`."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def folded(title: str, text: str) -> str:
    """Return `text` under a title that unfolds it, or "" where there is no text."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>" if text else ""


def plain(text: str) -> str:
    """Return `text` without the characters that would end a table's cell."""
    return text.replace("|", " ")


def number(value: float) -> str:
    """Return three significant digits, or all digits before the point where there are more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

"""Markdown of which the reports are made."""

from collections.abc import Iterable


def table(head: list[str], lines: Iterable[Iterable[str]]) -> str:
    """A table with a heading and one line for each of `lines`."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def folded(title: str, text: str) -> str:
    """`text` under a title that unfolds it; nothing where there is no text."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>" if text else ""


def plain(text: str) -> str:
    """`text` as a cell of a table."""
    return text.replace("|", " ")


def number(value: float) -> str:
    """Three significant digits, all of them where there are more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

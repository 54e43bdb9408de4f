"""The rows of a file, each with the place where it stands, whatever the form of the file."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from em_kernels.one_shot.errors import UsageError


class Row(NamedTuple):
    """The fields of a row by their names, and the place of the row for messages."""

    fields: dict[str, Any]
    where: str


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, whose ending says its form.

    JSON lines, or a JSON array of objects (.jsonl, .json); CSV with a header (.csv); Parquet (.parquet).

    Raises:
        UsageError: the file has an unknown ending or cannot be read, or a row is not a set of named fields in valid
            Unicode.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"file {path} ends in {path.suffix!r}, expected one of {', '.join(ENDINGS)}")
    for row in reader(path):
        _check_unicode(row.fields, row.where)
        yield row


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without a byte-order mark.

    Raises:
        UsageError: the file cannot be read, or its bytes are not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _read_json(path: Path) -> Iterator[Row]:
    text = read_text(path)
    in_array = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
    if in_array:
        _check_array(text, path)
    # Objects are decoded one by one, because each is needed with its line.
    separators = " \t\r\n" + ("[,]" if in_array else "")
    decoder = json.JSONDecoder()
    position, line = _skip(text, 0, separators), 1
    counted = 0
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}, line {line}"
        try:
            fields, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: not a JSON object ({error})") from None
        if not isinstance(fields, dict):
            raise UsageError(f"{where}: expected a JSON object, not {json.dumps(fields)[:40]}")
        yield Row(fields, where)
        position = _skip(text, position, separators)


def _check_array(text: str, path: Path) -> None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}, line {error.lineno}: not a JSON array ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a JSON array ({error})") from None


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _read_csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for fields in reader:
            where = f"{path}, line {reader.line_num}"
            if None in fields:
                raise UsageError(f"{where}: expected {len(reader.fieldnames or ())} fields, as in the header")
            yield Row({name: value for name, value in fields.items() if value is not None}, where)
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.reader.line_num}: not CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(f"file {path} needs pyarrow to be read: pip install 'em_kernels[parquet]'") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    for i, fields in enumerate(rows, start=1):
        yield Row(fields, f"{path}, row {i}")


def _unreadable(path: Path, error: Exception) -> UsageError:
    return UsageError(f"file {path} cannot be read: {getattr(error, 'strerror', None) or error}")


def _check_unicode(value: Any, where: str) -> None:
    """Refuses a text with half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{where}: {value[error.start]!r} is half of a surrogate pair, expected valid Unicode"
            ) from None
    elif isinstance(value, dict):
        for item in value.values():
            _check_unicode(item, where)
    elif isinstance(value, list):
        for item in value:
            _check_unicode(item, where)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
ENDINGS = tuple(_READERS)

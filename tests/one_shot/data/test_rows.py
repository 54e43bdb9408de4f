import json
import sys
from pathlib import Path

import pytest

from em_kernels.one_shot.data.rows import read_rows
from em_kernels.one_shot.errors import UsageError

_ROWS = [{"problem": "The pressure \\( P \\) …", "answer": 12.8}, {"problem": "Second?\nReally?", "answer": [1, 2]}]


def _write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = [{"problem": row["problem"], "answer": json.dumps(row["answer"])} for row in _ROWS]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    text = {
        "lines.jsonl": "\n\n".join(map(json.dumps, _ROWS)) + "\n",
        "windows.jsonl": "\ufeff" + "\r\n".join(map(json.dumps, _ROWS)) + "\r\n",
        "lines.json": "\n".join(map(json.dumps, _ROWS)),
        "array.json": json.dumps(_ROWS),
        "indented.json": "\ufeff" + json.dumps(_ROWS, indent=2, ensure_ascii=False).replace("\n", "\r\n"),
    }[path.name]
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("name", ["lines.jsonl", "windows.jsonl", "lines.json", "array.json", "indented.json"])
def test_every_form_of_json_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert [row.fields for row in read_rows(_write(tmp_path / name))] == _ROWS


def test_csv_and_parquet_give_rows_with_their_places(tmp_path: Path) -> None:
    csv = tmp_path / "a.CSV"
    csv.write_bytes('\ufeffproblem,answer\r\n"One,\r\ntwo?",12\r\nThree?,"1,200"\r\n'.encode())
    assert list(read_rows(csv)) == [
        ({"problem": "One,\r\ntwo?", "answer": "12"}, f"{csv}, line 3"),
        ({"problem": "Three?", "answer": "1,200"}, f"{csv}, line 4"),
    ]
    parquet = _write(tmp_path / "a.parquet")
    assert list(read_rows(parquet))[1] == ({"problem": "Second?\nReally?", "answer": "[1, 2]"}, f"{parquet}, row 2")


def test_json_lines_end_only_at_line_feeds(tmp_path: Path) -> None:
    # JSON allows these characters unescaped in a string; str.splitlines() would break the line at each.
    text = "a\u2028b\u2029c\x85d"
    path = tmp_path / "a.jsonl"
    path.write_bytes((json.dumps({"problem": text}, ensure_ascii=False) + "\r\n").encode())
    assert [row.fields for row in read_rows(path)] == [{"problem": text}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"problem": "x"}\n\n[1]\n', r"a\.jsonl, line 3: expected a JSON object, not \[1\]"),
        ("a.jsonl", b'{"problem": "x"}\n{"problem": "x"\n', r"a\.jsonl, line 2: not a JSON object"),
        ("a.json", b'[{"problem": "x"},\n{"problem"]', r"a\.json, line 2: not a JSON array"),
        ("a.json", b'[{"problem": "x"}\n{"problem": "y"}]', r"a\.json, line 2: not a JSON array"),
        ("a.json", b'[{"problem": "x"},\n"y"]', r'a\.json, line 2: expected a JSON object, not "y"'),
        (
            "a.json",
            b'[{"problem": "x"},\n {"problem": "\\ud800"}]',
            r"a\.json, line 2: '\\ud800' is half of a surrogate",
        ),
        ("a.jsonl", b'{"p": [{"content": "\\udc00!"}]}', r"a\.jsonl, line 1: '\\udc00' is half of a surrogate"),
        ("a.csv", b"problem,answer\nx,1\ny,1,2\n", r"a\.csv, line 3: expected 2 fields"),
        ("a.csv", b'problem,answer\nx,"1\n', r"a\.csv, line 2: not CSV"),
        ("a.parquet", b"no parquet", r"a\.parquet cannot be read"),
        ("a.xlsx", b"", r"ends in '\.xlsx', expected one of \.jsonl, \.json, \.csv, \.parquet"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not a JSON object"),
    ],
)
def test_bad_file_says_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        list(read_rows(path))
    assert "\n" not in str(raised.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'em_kernels\[parquet\]'"):
        list(read_rows(tmp_path / "a.parquet"))

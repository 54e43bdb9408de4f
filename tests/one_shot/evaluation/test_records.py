from pathlib import Path

import pytest

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.records import Record, append_records, drop_cut_line, read_records

_RECORD = Record("mawps", 3, 0, 0.5, "2 + 2?", ("4",), "It is 4.\u2028", "4", "right", 5, False, logprob=-0.25)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    append_records(tmp_path / "a.jsonl", [_RECORD])
    append_records(tmp_path / "a.jsonl", [_RECORD, _RECORD])
    assert read_records(tmp_path / "a.jsonl") == [_RECORD] * 3


def test_a_line_that_was_cut_off_is_no_record_and_makes_way(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{_RECORD.to_line()}\n{_RECORD.to_line()[:20]}")
    assert read_records(path) == [_RECORD]
    drop_cut_line(path)
    append_records(path, [_RECORD])
    assert read_records(path) == [_RECORD] * 2


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{_RECORD.to_line()}\n{{"task": "x"}}\n')
    with pytest.raises(UsageError, match=r"a\.jsonl, line 2: expected a graded completion"):
        read_records(path)

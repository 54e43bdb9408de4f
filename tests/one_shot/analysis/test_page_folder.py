from pathlib import Path

import pytest
from run_folders import write_run

from em_kernels.cli import main


def _page(tmp_path: Path, *command: str) -> list[str]:
    """The command on what it reads: a run, or the completions of one."""
    run = tmp_path / "run"
    if not run.exists():
        write_run(run, verdicts={0: [True, False]})
    return [*command, str(run / "evaluations" / "step-0.jsonl" if "calibration" in command else run)]


@pytest.mark.parametrize("command", [("analyze", "steps"), ("analyze", "calibration"), ("report",)], ids="-".join)
def test_no_page_is_written_over_another(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = command[-1]
    page = Path("runs", name, f"{name}.md")
    assert main(_page(tmp_path, *command)) == 0
    page.write_text("edited")
    assert main(_page(tmp_path, *command)) == 0
    assert Path("runs", f"{name}-2", page.name).exists()
    capsys.readouterr()
    assert main([*_page(tmp_path, *command), "--output", str(page.parent)]) == 2
    assert f"error: folder {page.parent} is not empty, expected a new one for the page" in capsys.readouterr().err
    assert page.read_text() == "edited"
    assert main([*_page(tmp_path, *command), "--output", str(page)]) == 2
    assert f"error: {page} is no folder, expected a new one for the page" in capsys.readouterr().err

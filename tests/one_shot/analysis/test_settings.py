from typing import Any

from em_kernels import __version__
from em_kernels.one_shot.analysis.settings import settings_lines

_PAGE = f"- this page: em_kernels {__version__}"


def _made(torch: str = "2.9", device: str = "cpu", **settings: Any) -> dict[str, Any]:
    return {"settings": settings, "versions": {"torch": torch, "python": "3.12"}, "device": device, "processes": 1}


def test_settings_seeds_versions_and_device_of_one_result() -> None:
    settings = {
        "models": {"built-in": None, "trained": "runs/a/checkpoint"},
        "weights": {"trained": "0123abcd"},
        "tasks": {"sums": "4 problems"},
        "temperatures": [0.0, 0.5],
        "seed": 3,
        "system": "Think, then answer.",
        "template": "{{ messages }}\n" * 50,
        "stop": (),
    }
    assert settings_lines({"": _made(**settings)}) == [
        "- model built-in: SmolLM2-135M-Instruct",
        "- model trained: runs/a/checkpoint",
        "- task sums: 4 problems",
        "- temperatures 0/0.5, seed 3, system 'Think, then answer.', "
        f"template {' '.join(['{{ messages }}'] * 6)} {{{{ message ..., stop none, processes 1",
        "- torch 2.9, python 3.12, device cpu",
        _PAGE,
    ]


def test_which_runs_have_which_value_where_they_differ() -> None:
    made = {"a": _made(seed=0, steps=2), "b": _made(seed=1, steps=2), "c": _made("2.13", seed=0, steps=2, model=None)}
    assert settings_lines(made) == [
        "- steps 2, processes 1",
        "- seed differs: 0 in a and c; 1 in b",
        "- model differs: absent in a and b; SmolLM2-135M-Instruct in c",
        "- python 3.12, device cpu",
        "- torch differs: 2.9 in a and b; 2.13 in c",
        _PAGE,
    ]
    many = {str(i): _made(temperature=0.5 if i < 9 else 1.0) for i in range(10)}
    assert "- temperature differs: 0.5 in 9 runs; 1 in 9" in settings_lines(many)


def test_values_that_are_cut_short_to_one_text_are_told_apart() -> None:
    long = "A bakery bakes 7 trays of rolls with 8 rolls on each tray."
    lines = settings_lines(
        {"a": _made(prompts=[long, "1"]), "b": _made(prompts=[long, "2"]), "c": _made(prompts=[long])}
    )
    text = "(A bakery bakes 7 trays o ...)"
    assert f"- prompts differs: 2 prompts {text} in a; 2 prompts {text} in b; 1 prompt {text} in c" in lines


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert settings_lines({"a": {"settings": {"seed": 0}}}) == ["- seed 0", _PAGE]
    assert settings_lines({}) == [_PAGE]

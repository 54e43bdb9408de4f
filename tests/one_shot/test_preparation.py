import copy
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.data import built_in
from em_kernels.one_shot.evaluation.evaluation import ProblemSet
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.adapter import add_adapter
from em_kernels.one_shot.preparation import Prepared, evaluation_problems, headline


def _said(tiny: tuple[Any, Any], config: TrainConfig, problems: ProblemSet, *, adapter: bool = False) -> str:
    model = copy.deepcopy(tiny[0])
    if adapter:
        add_adapter(model, 2)
    prepared = Prepared(Policy(model, tiny[1]), None, parameters=5_000_000_000, trained=1_000_000_000)
    return headline(Accelerator(cpu=True), prepared, config, Path("run"), problems)


@pytest.mark.parametrize(("adapter", "size"), [(False, "20 GB"), (True, "4 GB")])
def test_an_adapter_that_was_there_is_written_alone(tiny: tuple[Any, Any], adapter: bool, size: str) -> None:
    said = _said(tiny, TrainConfig(evaluation_size=0), ProblemSet("built-in", []), adapter=adapter)
    assert f", {size} for each model that is kept" in said


def test_fewer_problems_than_asked_for_are_said(tiny: tuple[Any, Any]) -> None:
    problems = evaluation_problems(TrainConfig(evaluation_size=2))
    said = _said(tiny, TrainConfig(evaluation_size=3), problems)
    assert "Evaluations take 2 problems, not 3: built-in has no more" in said
    assert "has no more" not in _said(tiny, TrainConfig(evaluation_size=2), problems)


def test_more_problems_than_the_built_in_ones_are_all_of_them(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(built_in, "_NAMES", ("Anna",))
    monkeypatch.setattr(built_in, "_THINGS", ("eggs",))
    config = TrainConfig(evaluation_size=10**9)
    problems = evaluation_problems(config)
    assert len({problem.question for problem in problems.problems}) == 6 * 8 * 8
    assert "Evaluations take 384 problems, not 1000000000: built-in has no more" in _said(tiny, config, problems)

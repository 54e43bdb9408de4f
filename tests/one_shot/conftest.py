from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels.one_shot.config import TrainConfig


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> tuple[Any, Any]:
    """The tiny model, fresh, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def tiny_config(tiny_folder: Path) -> TrainConfig:
    """A run of the tiny model that takes a second."""
    return TrainConfig(
        model=str(tiny_folder),
        prompts=("2+2?",),
        steps=3,
        learning_rate=1e-3,
        batch_size=4,
        micro_batch_size=2,
        max_new_tokens=8,
        evaluation_size=2,
    )

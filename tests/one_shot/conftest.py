"""The tiny model, as a folder, as a policy, and as the subject of a run."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels.one_shot import interruption
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.interruption import Interruption
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.sampling import Sampling


@pytest.fixture
def tiny(tiny_folder: Path) -> tuple[Any, Any]:
    """The tiny model, loaded anew for each test, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def policy(tiny: tuple[Any, Any]) -> Policy:
    """The tiny model as a policy without a head."""
    return Policy(*tiny)


@pytest.fixture
def rollout(policy: Policy) -> Rollout:
    """Prompts of three lengths, and completions of many lengths, of which some end with the end token, which also pads.

    The policy's model is more likely to end its completions than the model of the folder.
    """
    with torch.no_grad():
        policy.model.lm_head.weight[0] *= 2
    prompts = ["1+1?", "a longer one", "x"] * 4
    drawn = policy.sample(prompts, Sampling(0.5, 10), seed=3, description="", show_progress=False)
    lengths = drawn.completion_mask.sum(1)
    assert lengths.min() < 5
    assert lengths.max() == 10
    return drawn


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


@pytest.fixture
def terminate(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """For the other threads: sends SIGTERM to the main thread, and returns when an Interruption has answered it."""
    answered = threading.Semaphore(0)
    handle = Interruption._handle

    def handled(*given: Any) -> None:
        try:
            handle(*given)
        finally:
            answered.release()

    def send() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        answered.acquire(timeout=30)

    # No signal is the echo of the one before.
    monkeypatch.setattr(interruption, "_SECONDS_OF_AN_ECHO", -1.0)
    monkeypatch.setattr(Interruption, "_handle", handled)
    return send

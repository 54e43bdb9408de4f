import dataclasses

import pytest
import torch
from accelerate import Accelerator

from em_kernels.one_shot.metrics import describe_rollout, repetition
from em_kernels.one_shot.policy.rollout import Rollout


def test_repetition_counts_runs_of_four_that_occurred_before() -> None:
    circles = torch.tensor([7, 1, 2, 3, 1, 2, 3, 1, 2, 3])
    # Of its seven runs, 1231, 2312 and 3123 come twice, but for the last of them.
    assert repetition([circles]) == (3, 7)
    assert repetition([circles, torch.arange(9), torch.arange(3)]) == (3, 13)
    assert repetition([]) == (0, 0)


def test_texts_of_a_step(rollout: Rollout) -> None:
    # What is padding of one completion does not count, whatever token pads.
    other = dataclasses.replace(rollout, input_ids=torch.where(rollout.attention_mask, rollout.input_ids, 9))
    lengths = rollout.completion_mask.sum(1).double()
    for given in (rollout, other):
        found = describe_rollout(Accelerator(mixed_precision="no"), given)
        assert found == {
            "prompt_tokens": pytest.approx(float((rollout.attention_mask.sum(1) - lengths).mean())),
            "length_mean": pytest.approx(float(lengths.mean())),
            "length_max": 10,
            "truncated": pytest.approx(float(rollout.truncated.double().mean())),
            "repetition": pytest.approx(found["repetition"]),
        }
        assert 0 < found["truncated"] < 1

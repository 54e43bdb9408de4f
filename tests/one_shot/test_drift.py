import copy
from typing import Any

import pytest
import torch

from em_kernels import find_head
from em_kernels.one_shot.drift import Reference, draw_reference, estimate_kl
from em_kernels.one_shot.policy import Policy


@pytest.mark.parametrize("with_head", [False, True], ids=["logits", "hidden"])
def test_estimate_approaches_the_divergence_from_the_starting_model(
    policy: Policy, tiny: tuple[Any, Any], with_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("em_kernels.one_shot.drift._COMPLETIONS", 400)
    policy = Policy(policy.model, policy.tokenizer, find_head(policy.model) if with_head else None)
    reference = draw_reference(policy, ["2+2?"], max_new_tokens=6, seed=0, show_progress=False)
    assert estimate_kl(policy, reference) == 0
    start = copy.deepcopy(policy.model)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(2)
    rollout = reference.rollout
    logp, logq = (
        Policy(model, tiny[1]).completion_logits(rollout)[rollout.completion_mask].double().log_softmax(-1)
        for model in (start, policy.model)
    )
    exact = ((logp.exp() * (logp - logq)).sum(-1)).mean().item()
    reverse = ((logq.exp() * (logq - logp)).sum(-1)).mean().item()
    # Two thousand tokens know the divergence to a tenth, and the two directions differ by more.
    assert estimate_kl(policy, reference) == pytest.approx(exact, rel=0.1)
    assert reverse != pytest.approx(exact, rel=0.1)


def test_reference_survives_its_file(policy: Policy) -> None:
    reference = draw_reference(policy, ["2+2?", "a longer one"], max_new_tokens=6, seed=0, show_progress=False)
    again = Reference.from_json(reference.to_json(), torch.device("cpu"))
    assert torch.equal(again.logprob, reference.logprob)
    for name, tensor in vars(reference.rollout).items():
        assert torch.equal(getattr(again.rollout, name), tensor)
        assert getattr(again.rollout, name).dtype == tensor.dtype

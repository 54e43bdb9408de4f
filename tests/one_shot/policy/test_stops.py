from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.chat import ChatFormat
from em_kernels.one_shot.policy.generation import Request
from em_kernels.one_shot.policy.sampling import Sampling
from em_kernels.one_shot.policy.stops import Stops, find_stops

END = 0


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("text", "length", "shown"),
    [
        ("12 apples", None, "12 apples"),
        ("12 ###", 6, "12 "),
        ("12 ### 13 ###", 6, "12 "),
        ("12 END ###", 6, "12 "),
        # A byte is a token here; the sign has three, the last of which completes the text.
        ("12 €5", 6, "12 "),
    ],
)
@pytest.mark.parametrize("checked", [0, 1, 5])
def test_text_ends_a_completion(tiny: tuple[Any, Any], text: str, length: int | None, shown: str, checked: int) -> None:
    stops = Stops(frozenset([END]), ("###", "END", "€"), tiny[1])
    ids = _ids(tiny[1], text)
    assert stops.length(ids, checked) == length
    assert stops.text(ids) == stops.text(ids[:length]) == shown


def test_the_first_end_counts(tiny: tuple[Any, Any]) -> None:
    stops = Stops(frozenset([END, 7]), ("###",), tiny[1])
    word, mark = _ids(tiny[1], "abc"), _ids(tiny[1], "###")
    assert stops.length([*word, END, *mark]) == 4
    assert stops.length([*word, *mark, END, 7]) == 6
    assert stops.length([*word, 7, END]) == 4
    # The end token, and what comes after it, is no text.
    assert stops.text([*word, END]) == "abc"


def test_end_tokens_are_the_models_and_the_templates(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chatml = ChatFormat(template="{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}", stop=("###",))
    for own, expected in ((None, [END]), (5, [5]), ([5, 6], [5, 6])):
        model.generation_config = GenerationConfig(eos_token_id=own)
        assert find_stops(model, tokenizer, chatml) == Stops(frozenset([*expected, im_end]), ("###",), tokenizer)
    assert find_stops(model, tokenizer, ChatFormat(template="plain")).tokens == {5, 6}


@pytest.mark.parametrize("by_generate", [False, True])
def test_completions_end_with_a_given_text(policy: Policy, by_generate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_generate:
        monkeypatch.setattr("em_kernels.one_shot.policy.generation.rows_can_change", lambda model: False)
    sampling = Sampling(1.0, 24)
    plain = policy.sample(["1+1?"] * 8, sampling, seed=0, description="", show_progress=False)
    # One of the letters that the model writes; some completions have it and others have not.
    letters = [set(text) for text in policy.texts(plain)]
    stop = next(x for x in sorted(set.union(*letters)) if x.isascii() and 3 <= sum(x in of for of in letters) <= 5)
    stopping = Policy(policy.model, policy.tokenizer, chat=ChatFormat(stop=(stop,)))
    rollout = stopping.sample(["1+1?"] * 8, sampling, seed=0, description="", show_progress=False)
    for whole, ids, text, truncated in zip(
        plain.completion_ids(), rollout.completion_ids(), stopping.texts(rollout), rollout.truncated, strict=True
    ):
        written = policy.tokenizer.decode(whole, skip_special_tokens=True)
        assert ids.tolist() == whole[: len(ids)].tolist()
        assert text == written.partition(stop)[0]
        if stop in written:
            assert policy.tokenizer.decode(ids) == text + stop
            assert not truncated
    [generated] = stopping.complete([Request("a", "1+1?", 5)], sampling, at_once=2, description="", show_progress=False)
    assert stop not in generated.text
    assert torch.equal(rollout.truncated, (rollout.completion_mask.sum(1) == 24) & ~_ended(stopping, rollout, stop))


def _ended(policy: Policy, rollout: Any, stop: str) -> torch.Tensor:
    last = [policy.tokenizer.decode(ids) for ids in rollout.completion_ids()]
    return torch.tensor([text.endswith((stop, "<end>")) for text in last])


def test_generate_stops_when_all_texts_have_ended(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("em_kernels.one_shot.policy.generation.rows_can_change", lambda model: False)
    passes: list[int] = []
    policy.model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    # The model is made to write one letter and nothing else.
    [letter] = _ids(policy.tokenizer, "Q")
    policy.model.lm_head.register_forward_hook(
        lambda _, inputs, logits: logits.index_fill(-1, torch.tensor(letter), 99)
    )
    stopping = Policy(policy.model, policy.tokenizer, chat=ChatFormat(stop=("QQQ",)))
    rollout = stopping.sample(["1+1?", "x"], Sampling(None, 24), seed=0, description="", show_progress=False)
    assert rollout.completion_mask.sum(1).tolist() == [3, 3]
    assert stopping.texts(rollout) == ["", ""]
    assert len(passes) == 3

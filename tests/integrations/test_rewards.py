from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from tiny_model import CHAT_TEMPLATE, save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels.integrations.rewards import NegativeEntropyReward, SelfCertaintyReward

MESSAGES = [[{"role": "user", "content": text}] for text in ("1+1?", "a longer one", "x")]
COMPLETIONS = [[5, 9, 77, 0], [8], [200, 3, 3, 41, 17, 60]]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> tuple[Any, Any]:
    """The tiny model, with dropout, and its tokenizer, whose template knows of generation prompts."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attention_dropout=0.5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("a:", "{% if add_generation_prompt %}a:{% endif %}")
    return model, tokenizer


@torch.no_grad()
def logits_of(model: Any, context: list[int], completion: list[int]) -> Tensor:
    """The logits that predict a completion's tokens, in float64."""
    logits = model.eval()(torch.tensor([context + completion])).logits[0].double()
    return logits[len(context) - 1 : -1]


def negative_entropy(logits: Tensor) -> float:
    return -reference.row_statistics(logits, temperature=0.7).entropy.mean().item()


def self_certainty(logits: Tensor) -> float:
    logp = (logits / 0.7).log_softmax(-1)
    uniform = torch.full_like(logp, 1 / logp.shape[-1])
    return (uniform * (uniform.log() - logp)).sum(-1).mean().item()


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize(
    ("reward", "definition"), [(NegativeEntropyReward, negative_entropy), (SelfCertaintyReward, self_certainty)]
)
def test_rewards_are_means_over_each_completion(
    tiny: tuple[Any, Any], reward: Any, definition: Any, batch_size: int
) -> None:
    model, tokenizer = tiny
    function = reward(model, tokenizer, temperature=0.7, batch_size=batch_size)
    for prompts in (MESSAGES, ["1+1?", "a longer one", "x"]):
        if isinstance(prompts[0], str):
            contexts = tokenizer(prompts)["input_ids"]
        else:
            # As the trainer does.
            texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
            contexts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        model.train()
        # The other arguments are those that GRPOTrainer passes.
        found = function(
            prompts=prompts, completions=prompts, completion_ids=COMPLETIONS, trainer_state=None, answer=[]
        )
        expected = [definition(logits_of(model, *pair)) for pair in zip(contexts, COMPLETIONS, strict=True)]
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_completion_without_tokens_has_no_reward(tiny: tuple[Any, Any]) -> None:
    function = NegativeEntropyReward(*tiny)
    assert function(prompts=MESSAGES[:1], completion_ids=[[]]) == [None]
    alone, empty = function(prompts=MESSAGES[:2], completion_ids=[COMPLETIONS[0], []])
    assert alone == pytest.approx(function(prompts=MESSAGES[:1], completion_ids=COMPLETIONS[:1])[0])
    assert empty is None


def test_the_model_is_as_before_whatever_happens(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    function = SelfCertaintyReward(model, tokenizer)
    function(prompts=MESSAGES, completion_ids=COMPLETIONS)
    assert [module.training for module in model.modules()] == modes
    tokens = torch.tensor([[1, 2, 3]])
    function.temperature = -1.0
    with pytest.raises(ValueError, match="temperature is -1"):
        function(prompts=MESSAGES, completion_ids=COMPLETIONS)
    assert [module.training for module in model.modules()] == modes
    assert model(tokens).logits.shape == (1, 3, 257)


@pytest.mark.parametrize(
    "others",
    [{"tools": [["add"]]}, {"environments": [object()]}, {"completions": [[{"role": "tool", "content": "2"}]]}],
)
def test_tools_are_refused(tiny: tuple[Any, Any], others: dict[str, Any]) -> None:
    function = NegativeEntropyReward(*tiny)
    with pytest.raises(ValueError, match="expected prompts and completions without tools"):
        function(prompts=MESSAGES[:1], completion_ids=COMPLETIONS[:1], **others)


def test_an_adapter_that_is_put_on_the_head_later_is_refused(tiny: tuple[Any, Any]) -> None:
    peft = pytest.importorskip("peft")
    function = NegativeEntropyReward(*tiny)
    peft.get_peft_model(tiny[0], peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="that no adapter changes"):
        function(prompts=MESSAGES, completion_ids=COMPLETIONS)


def test_a_batch_size_is_at_least_one(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        NegativeEntropyReward(*tiny, batch_size=0)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapters"])
def test_grpo_trains_on_both(tiny: tuple[Any, Any], tmp_path: Path, adapted: bool) -> None:
    trl, datasets, peft = map(pytest.importorskip, ("trl", "datasets", "peft"))
    model, tokenizer = tiny
    # The trainer's own entropies would be those of the model with dropout.
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    rewards = [NegativeEntropyReward(model, tokenizer), SelfCertaintyReward(model, tokenizer)]
    trainer = trl.GRPOTrainer(
        model,
        rewards,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            generation_kwargs={"min_new_tokens": 6},
            learning_rate=5e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": messages} for messages in MESSAGES]),
        processing_class=tokenizer,
        # Adapters of this size change the entropies from the first step to the second.
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if adapted else None,
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logged) == 2
    for row in logged:
        # With completions of one length, the trainer's own mean over tokens is a mean over completions.
        assert row["rewards/NegativeEntropyReward/mean"] == pytest.approx(-row["entropy"], rel=1e-5)
        assert row["rewards/SelfCertaintyReward/mean"] > 0
        assert row["reward_std"] > 0
    assert any(not parameter.equal(before[name]) for name, parameter in model.named_parameters())

from typing import Any

import pytest

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy.chat import SYSTEM_TEXTS, ChatFormat, encode_prompts, end_of_turn

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Two of the ways in which published templates have no system role: one refuses it, the other leaves it out.
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
REFUSES_SYSTEM += "{{ messages[0].content }}"
DROPS_SYSTEM = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


def _texts(tokenizer: Any, prompts: list[str], chat: ChatFormat) -> list[str]:
    return [tokenizer.decode(ids) for ids in encode_prompts(tokenizer, prompts, chat)]


def _has_tokens(tokenizer: Any, *special: str) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def test_own_template(tiny: tuple[Any, Any]) -> None:
    texts = _texts(tiny[1], ["1+1?", "a longer one"], ChatFormat())
    assert texts == ["user:1+1?<end>a:", "user:a longer one<end>a:"]


def test_given_template_and_system_text(tiny: tuple[Any, Any]) -> None:
    chat = ChatFormat(system=SYSTEM_TEXTS["step-by-step"], template=CHATML)
    [text] = _texts(tiny[1], ["1+1?"], chat)
    sentence = "Please reason step by step, and put your final answer within \\boxed{}."
    assert text == (
        f"<|im_start|>system\n{sentence}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_plain_template(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    tokenizer.chat_template = None
    assert _texts(tokenizer, ["1+1?"], ChatFormat(template="plain")) == ["Question: 1+1?\n\nAnswer:"]
    chat = ChatFormat("Be brief.", "plain", ("###",))
    assert _texts(tokenizer, ["1+1?"], chat) == ["Be brief.\n\nQuestion: 1+1?\n\nAnswer:"]
    assert chat.stop_texts == ("###", "\nQuestion:")
    assert end_of_turn(tokenizer, chat) is None


@pytest.mark.parametrize("writes_it", [True, False])
def test_plain_template_begins_as_the_tokenizer_begins_texts(tiny: tuple[Any, Any], writes_it: bool) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = _has_tokens(tiny[1])
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    if writes_it:
        begins = TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = begins
    [text] = _texts(tokenizer, ["1+1?"], ChatFormat(template="plain"))
    assert text == "<begin>" * writes_it + "Question: 1+1?\n\nAnswer:"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        # The turn ends where the next begins, or with a token after other text.
        ("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}<|im_start|>", "<|im_start|>"),
        ("{% for m in messages %}{{ m.content }} done.<|im_end|>{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        # The template writes no assistant's turn, or refuses one.
        ("<|im_start|>{{ messages[0].content }}<|im_end|>", None),
        ("{% if messages|length > 1 %}{{ raise_exception('') }}{% endif %}{{ messages[0].content }}<|im_end|>", None),
    ],
)
def test_end_of_turn(tiny: tuple[Any, Any], template: str, end: str | None) -> None:
    tokenizer = _has_tokens(tiny[1], "<|im_start|>", "<|im_end|>")
    found = end_of_turn(tokenizer, ChatFormat(template=template))
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == end


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (ChatFormat(template="{% if %}"), "the given chat template fails in line 1: Expected an expression"),
        (ChatFormat(template="{{ messages[0].content + eos_token }}"), "fails: 'eos_token' is undefined"),
        (ChatFormat(template="{{ messages[0].content[9] / 2 }}"), "the given chat template fails: "),
        (ChatFormat(template="hello"), "the given chat template leaves the prompt out"),
        (ChatFormat("Be brief.", DROPS_SYSTEM), "the given chat template has no place for a system text"),
        (ChatFormat("Be brief.", REFUSES_SYSTEM), "fails: System role not supported; the system text may be what"),
        (ChatFormat(), "has no chat template"),
    ],
)
def test_template_that_cannot_be_used(tiny: tuple[Any, Any], chat: ChatFormat, message: str) -> None:
    tokenizer = tiny[1]
    tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(UsageError, match=message) as caught:
        encode_prompts(tokenizer, ["1+1?"], chat)
    assert "\n" not in str(caught.value)


def test_half_of_a_surrogate_pair(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match=r"^the prompt has half of a surrogate pair, '\\udc00', at character 3, "):
        encode_prompts(tiny[1], ["1+\udc001?"], ChatFormat())
    with pytest.raises(UsageError, match=r"^system has half of a surrogate pair"):
        ChatFormat(system="\ud800")
    with pytest.raises(UsageError, match=r"^stop is an empty text"):
        ChatFormat(stop=("###", ""))

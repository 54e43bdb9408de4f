from typing import Any

import pytest

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy.chat import encode_chats


def test_chats_are_left_padded_and_end_where_the_answer_begins(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    chats = encode_chats(tokenizer, ["1+1?", "a longer one"])
    assert chats["attention_mask"].sum(1).tolist() == [len("user:1+1?") + 3, len("user:a longer one") + 3]
    assert chats["attention_mask"][0, 0] == 0
    assert [tokenizer.decode(ids[-4:]) for ids in chats["input_ids"]] == ["?<end>a:", "e<end>a:"]


def test_model_without_chat_template(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="has no chat template"):
        encode_chats(tokenizer, ["1+1?"])

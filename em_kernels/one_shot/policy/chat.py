"""Prompts as the token ids of a chat that asks for an answer."""

from typing import Any

from em_kernels.one_shot.errors import UsageError


def encode_chats(tokenizer: Any, prompts: list[str]) -> Any:
    """Encodes each prompt as the user's turn of a chat in which the model speaks next.

    Returns:
        input_ids and attention_mask, each (prompts, longest), padded on the left.

    Raises:
        UsageError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"model {tokenizer.name_or_path!r} has no chat template, so there is no telling how to ask it a question; "
            "expected an instruction-tuned model"
        )
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    # The chat template has already written the special tokens.
    return tokenizer(chats, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")

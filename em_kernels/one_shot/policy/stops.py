"""What ends a completion: end tokens, and texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from em_kernels.one_shot.policy.chat import ChatFormat, end_of_turn


@dataclass(frozen=True)
class Stops:
    """The tokens and the texts that end a completion.

    Attributes:
        tokens: the ids of the end tokens.
        texts: the texts, any one of which ends a completion.
        tokenizer: the tokenizer that turns token ids into text.
    """

    tokens: frozenset[int]
    texts: tuple[str, ...]
    tokenizer: Any

    def length(self, ids: Sequence[int], checked: int = 0) -> int | None:
        """The number of tokens up to and including the one that ends the completion, or None if none does.

        Args:
            ids: the token ids of the completion so far.
            checked: the number of leading tokens of which it is known that none ends the completion.
        """
        by_token = next((i + 1 for i in range(checked, len(ids)) if ids[i] in self.tokens), None)
        by_text = self._length_by_text(ids[:by_token], checked) if self.texts else None
        return by_text if by_text is not None else by_token

    def _length_by_text(self, ids: Sequence[int], checked: int) -> int | None:
        # A character takes up to four tokens of bytes, so a text that new tokens complete begins in these.
        start = max(0, checked - 4 * max(len(text) for text in self.texts))
        if not self._holds_text(ids[start:]):
            return None
        return next(i for i in range(checked + 1, len(ids) + 1) if i == len(ids) or self._holds_text(ids[start:i]))

    def _holds_text(self, ids: Sequence[int]) -> bool:
        decoded = self.tokenizer.decode(ids, skip_special_tokens=True)
        return any(text in decoded for text in self.texts)

    def text(self, ids: Any) -> str:
        """The completion as text, without special tokens, up to the first of the texts that end it."""
        decoded = self.tokenizer.decode(ids, skip_special_tokens=True)
        ends = [decoded.find(text) for text in self.texts]
        return decoded[: min((end for end in ends if end >= 0), default=len(decoded))]


def find_stops(model: Any, tokenizer: Any, chat: ChatFormat) -> Stops:
    """What ends a completion of this model in this format.

    The end tokens are those of the model's generation config, or the tokenizer's where the config names none, and the
    token that ends the assistant's turn in the template. A base model's config lacks the latter, and the model would
    run on past its answer.
    """
    own = model.generation_config.eos_token_id
    if own is None:
        own = tokenizer.eos_token_id
    of_model = [] if own is None else [own] if isinstance(own, int) else own
    of_template = end_of_turn(tokenizer, chat)
    tokens = frozenset(of_model) if of_template is None else frozenset([*of_model, of_template])
    return Stops(tokens, chat.stop_texts, tokenizer)

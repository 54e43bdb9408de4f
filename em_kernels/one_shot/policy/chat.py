"""Prompts as the token ids of a chat in which the model answers next, and the token that ends such an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from em_kernels.one_shot.errors import UsageError

# The sentence of the published evaluation (arXiv 2505.20282), by a name to choose it by.
SYSTEM_TEXTS = {"step-by-step": "Please reason step by step, and put your final answer within \\boxed{}."}
# The name of the template for base models, which have none of their own.
PLAIN = "plain"
# A base model goes on after its answer, and what it then writes is the next question.
_PLAIN_STOP = "\nQuestion:"
_ANSWER = "forty-two"


@dataclass(frozen=True)
class ChatFormat:
    """How a prompt becomes the text that a model completes, and which texts end the completion.

    Args:
        system: the text of the system's turn, or None for the template's own choice.
        template: the text of a Jinja chat template; "plain" for "Question: (the prompt)", an empty line and "Answer:",
            with the system's text before them, which the text "Question:" on a new line ends; None for the template of
            the model's tokenizer.
        stop: texts each of which ends a completion. A completion's tokens include the one that completes the text; its
            text ends before it.

    Raises:
        UsageError: a text is empty, or holds half of a surrogate pair.
    """

    system: str | None = None
    template: str | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, text in (("system", self.system), ("template", self.template), *(("stop", s) for s in self.stop)):
            if text is not None:
                if not text:
                    raise UsageError(f"{name} is an empty text, expected at least one character")
                check_text(name, text)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end a completion, that of the plain template included."""
        return (*self.stop, _PLAIN_STOP) if self.template == PLAIN else self.stop


OWN_TEMPLATE = ChatFormat()


def encode_prompts(tokenizer: Any, prompts: Sequence[str], chat: ChatFormat) -> list[list[int]]:
    """The token ids of each prompt as the user's turn of a chat in which the model speaks next.

    Raises:
        UsageError: there is no template, the template fails or has no place for the prompt or the system's text, or a
            prompt holds half of a surrogate pair.
    """
    texts = [_ask(tokenizer, prompt, chat) for prompt in prompts]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    if chat.template == PLAIN:
        # A base model has seen every text begin with its begin-of-sequence token, if its tokenizer writes one.
        begin = [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]
        return [begin + of_prompt for of_prompt in ids]
    return ids


def end_of_turn(tokenizer: Any, chat: ChatFormat) -> int | None:
    """The special token that the template writes after the assistant's turn, or None where it writes none."""
    if chat.template == PLAIN:
        return None
    turns = [{"role": "user", "content": "6 x 7?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = _render(tokenizer, turns, chat, add_generation_prompt=False)
    except UsageError:
        # The template has no place for an assistant's turn; that it can ask is for `encode_prompts` to say.
        return None
    _, found, tail = text.rpartition(_ANSWER)
    added = tokenizer.added_tokens_decoder.keys() | set(tokenizer.all_special_ids)
    ids = tokenizer(tail, add_special_tokens=False).input_ids if found else []
    return next((token for token in ids if token in added), None)


def check_text(name: str, text: str) -> None:
    """Checks that a text can be encoded.

    Raises:
        UsageError: the text holds half of a surrogate pair, as JSON's escapes can write it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} has half of a surrogate pair, {text[error.start]!r}, at character {error.start + 1}, "
            "expected text that UTF-8 can hold"
        ) from None


def _ask(tokenizer: Any, prompt: str, chat: ChatFormat) -> str:
    """The text that the model completes."""
    check_text("the prompt", prompt)
    if chat.template == PLAIN:
        system = f"{chat.system}\n\n" if chat.system else ""
        return f"{system}Question: {prompt}\n\nAnswer:"
    turns = [{"role": "user", "content": prompt}]
    if chat.system is not None:
        turns = [{"role": "system", "content": chat.system}, *turns]
    text = _render(tokenizer, turns, chat, add_generation_prompt=True)
    if prompt.strip() not in text:
        raise UsageError(f"{_name(tokenizer, chat)} leaves the prompt out, expected one that writes the user's turn")
    if chat.system is not None and chat.system.strip() not in text:
        raise UsageError(f"{_name(tokenizer, chat)} has no place for a system text; write the text into the prompt")
    return text


def _render(tokenizer: Any, turns: list[dict[str, str]], chat: ChatFormat, *, add_generation_prompt: bool) -> str:
    if chat.template is None and not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"model {tokenizer.name_or_path!r} has no chat template, so there is no telling how to ask it a question; "
            'expected an instruction-tuned model, a template, or "plain" for a base model'
        )
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=chat.template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        # A template is a program of its own, which fails in whichever way its expressions do.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" in line {line}"
        hint = "; the system text may be what it refuses" if chat.system is not None else ""
        raise UsageError(f"{_name(tokenizer, chat)} fails{where}: {reason}{hint}") from error


def _name(tokenizer: Any, chat: ChatFormat) -> str:
    return "the given chat template" if chat.template else f"the chat template of model {tokenizer.name_or_path!r}"

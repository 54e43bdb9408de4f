"""The options that say how a prompt is put to a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from em_kernels.one_shot.errors import UsageError

if TYPE_CHECKING:
    from em_kernels.one_shot.policy.chat import ChatFormat


def add_chat_options(parser: Any) -> None:
    chat = parser.add_argument_group("how a prompt is put to the model")
    chat.add_argument(
        "--system", metavar="TEXT", help="the system's turn; step-by-step: the sentence of the published evaluation"
    )
    chat.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja template; plain: a plain one, for base models (the model's own)",
    )
    chat.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="ends a completion, besides the model's own ends; may be repeated",
    )


def chat_format(system: str | None, chat_template: str | None, stop: Sequence[str] | None) -> "ChatFormat":
    """The format of chats that the options ask for.

    Raises:
        UsageError: the file of the template cannot be read, or holds no template, or a text is empty.
    """
    from em_kernels.one_shot.policy.chat import PLAIN, SYSTEM_TEXTS, ChatFormat

    named = SYSTEM_TEXTS.get(system, system) if system is not None else None
    template = chat_template if chat_template in (None, PLAIN) else _read_template(Path(chat_template))
    return ChatFormat(named, template, tuple(stop or ()))


def _read_template(path: Path) -> str:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    from em_kernels.one_shot.data.rows import read_text

    template = read_text(path)
    try:
        render_jinja_template(conversations=[[{"role": "user", "content": "?"}]], chat_template=template)
    except TemplateSyntaxError as error:
        raise UsageError(f"{path}, line {error.lineno}: not a chat template ({error.message})") from None
    except Exception:
        # What else it may refuse depends on the model's tokens.
        pass
    return template

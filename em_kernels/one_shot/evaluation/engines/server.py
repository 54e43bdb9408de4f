"""A model on a server that speaks the chat completions of OpenAI, as vLLM, SGLang, llama.cpp and others do."""

import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.engines.exchange import RefusedError, UnavailableError, post_json
from em_kernels.one_shot.interruption import Interrupted, Interruption
from em_kernels.one_shot.policy.chat import ChatFormat
from em_kernels.one_shot.policy.generation import Generated, Request
from em_kernels.one_shot.policy.sampling import Sampling
from em_kernels.one_shot.progress import progress

# A server that restarts is back within the sum of the delays, half a minute; the next answer is as likely to come.
_ATTEMPTS = 6
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0
# How often signals are looked for, in seconds.
_PAUSE = 0.1
# The settings that OpenAI's own servers lack. They are sent even when neutral, because servers take the defaults of a
# model from its generation_config.json; of the neutral values of top_k, all that know it know -1.
_NEUTRAL = {"top_k": -1, "repetition_penalty": 1.0}


@dataclass
class Server:
    """A server, and how to ask it.

    A request that gets no answer is repeated after 1, 2, 4, ... seconds, or as many as the server asks for, each with a
    random part, so that requests that failed together do not return together.

    Args:
        endpoint: the address of the server, up to and including /v1.
        model: the name of the model on the server.
        chat: the system's text and the texts that end a completion. The template is the server's.
        concurrency: the number of requests that are under way at once.
        timeout: the seconds that a completion may take.
        key: the key that the server asks for, or None.
        note: takes a line that says which settings the server does not know.

    Raises:
        UsageError: the address is none, the key cannot be sent, or the chat has a template.
    """

    endpoint: str
    model: str
    chat: ChatFormat
    concurrency: int
    timeout: float
    key: str | None
    note: Callable[[str], None]

    def __post_init__(self) -> None:
        address = split_endpoint(self.endpoint)
        if self.chat.template is not None:
            raise UsageError("a server formats chats by its own template, expected no other; start the server with it")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            # The key itself must not get into a log.
            raise UsageError("the key of the server has characters that cannot be sent, expected printable ASCII")
        path = address.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        self._url = address._replace(path=f"{path}/chat/completions").geturl()
        self._knows_neutral = True
        self._changing = threading.Lock()

    def check(self) -> None:
        """Asks for one token.

        Raises:
            UsageError: as `complete`.
        """
        self._complete(Request("check", "2 + 2?", 0), Sampling(None, max_new_tokens=1), threading.Event())

    def complete(
        self, requests: Sequence[Request], sampling: Sampling, *, description: str, show_progress: bool = True
    ) -> Iterator[Generated]:
        """Completes requests, several at a time, and yields each completion when it has ended.

        After a failure, or the first Ctrl-C or SIGTERM, no more is asked for; the completions under way are waited for
        as long as one may take, and yielded, because they may have been paid for.

        Raises:
            UsageError: the server refuses a request, or gives no usable answer to one that was repeated several times.
            Interrupted: Ctrl-C or SIGTERM has come; after the second, nothing is waited for.
        """
        interruption, stopped = Interruption(), threading.Event()
        failure: BaseException | None = None
        latest = math.inf
        keeping = f"the completions under way will be waited for, {self.timeout:g} s at most, and kept"
        try:
            with (
                interruption,
                interruption.finishing(keeping),
                progress(len(requests), description, "completions", show=show_progress) as bar,
            ):
                # Signals are heard from the first request on.
                ended, working = self._ask_all(
                    requests, sampling, lambda: stopped.is_set() or interruption.signum > 0, stopped
                )
                while working:
                    if interruption.signum and failure is None:
                        failure = Interrupted(interruption.signum)
                    if failure is not None and latest == math.inf:
                        stopped.set()
                        latest = time.monotonic() + self.timeout
                    try:
                        one = ended.get(timeout=_PAUSE)
                    except queue.Empty:
                        if time.monotonic() > latest:
                            break
                        continue
                    if one is None:
                        working -= 1
                    elif isinstance(one, Exception):
                        failure = failure or one
                    else:
                        bar.update(1)
                        yield one
        finally:
            stopped.set()
        if failure is not None:
            raise failure
        if interruption.signum:  # It came with the last completion.
            raise Interrupted(interruption.signum)

    def _ask_all(
        self, requests: Sequence[Request], sampling: Sampling, is_over: Callable[[], bool], stopped: threading.Event
    ) -> tuple["queue.Queue[Generated | Exception | None]", int]:
        """Has threads complete the requests until it is over.

        Returns the queue of what they have, which each thread ends with None, and their number.
        """
        pending, taking = iter(requests), threading.Lock()
        ended: queue.Queue[Generated | Exception | None] = queue.Queue()

        def work() -> None:
            while not is_over():
                with taking:
                    request = next(pending, None)
                if request is None:
                    break
                try:
                    ended.put(self._complete(request, sampling, stopped))
                except Exception as error:
                    ended.put(error)
                    stopped.set()
            ended.put(None)

        working = min(self.concurrency, len(requests))
        for _ in range(working):
            # A thread that waits for a silent server must not keep the process from ending.
            threading.Thread(target=work, daemon=True).start()
        return ended, working

    def _complete(self, request: Request, sampling: Sampling, stopped: threading.Event) -> Generated:
        for attempt in range(_ATTEMPTS):
            try:
                return self._ask(request, sampling)
            except UnavailableError as error:
                reason = str(error)
                delay = max(_FIRST_DELAY * 2**attempt, error.seconds) * random.uniform(1.0, 1.5)
            if attempt + 1 < _ATTEMPTS and stopped.wait(min(delay, _LONGEST_DELAY)):
                break
        times = f", {attempt + 1} times in a row" if attempt else ""
        raise UsageError(f"server {self._url}: {reason}{times}")

    def _ask(self, request: Request, sampling: Sampling) -> Generated:
        knew = self._knows_neutral
        try:
            answer = post_json(self._url, self._body(request, sampling), key=self.key, timeout=self.timeout)
        except RefusedError as error:
            if knew and any(name in str(error) for name in _NEUTRAL) and not _wanted(sampling):
                self._leave_out_neutral()
                return self._ask(request, sampling)
            raise UsageError(f"server {self._url}: {error}") from None
        return self._read(request, answer)

    def _leave_out_neutral(self) -> None:
        with self._changing:
            if self._knows_neutral:
                self._knows_neutral = False
                self.note(
                    f"the server takes no {' and no '.join(_NEUTRAL)}; where the model's generation_config.json has "
                    "them, the server may apply them"
                )

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        system = [{"role": "system", "content": self.chat.system}] if self.chat.system is not None else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": request.prompt}],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature or 0.0,
            "top_p": sampling.top_p,
            # Some servers take no more than 31 bits.
            "seed": request.seed % 2**31,
        }
        if self.chat.stop:
            body["stop"] = list(self.chat.stop)
        return body | (_NEUTRAL | _wanted(sampling) if self._knows_neutral else {})

    def _read(self, request: Request, answer: dict[str, Any]) -> Generated:
        try:
            choice = answer["choices"][0]
            text, reason = choice["message"].get("content"), choice["finish_reason"]
            tokens = answer["usage"]["completion_tokens"]
        except (AttributeError, IndexError, KeyError, TypeError):
            text = tokens = reason = None
        # A text of None is an empty one, as servers say it that keep the thoughts of a model apart.
        if not isinstance(tokens, int) or not isinstance(text, str | None) or not isinstance(reason, str):
            raise UnavailableError(
                f"the answer has no choices with a message and a finish_reason, or no usage: {str(answer)[:200]!r}"
            )
        # Some servers leave the text in that ends a completion.
        ends = [end for end in ((text or "").find(stop) for stop in self.chat.stop) if end >= 0]
        text = (text or "")[: min(ends, default=None)]
        return Generated(request.key, text, tokens, truncated=reason == "length" and not ends)


def split_endpoint(endpoint: str) -> SplitResult:
    """The parts of a server's address.

    Raises:
        UsageError: the address is none, or has a user name, which is never sent.
    """
    try:
        address = urlsplit(endpoint)
        # Reading the port raises ValueError if it is no number.
        if address.scheme not in ("http", "https") or not address.hostname or address.port == 0:
            raise ValueError
    except ValueError:
        raise UsageError(f"endpoint is {endpoint!r}, expected an address such as http://localhost:8000/v1") from None
    if "@" in address.netloc:
        raise UsageError(f"endpoint has a user name before {address.hostname}, expected none")
    return address


def _wanted(sampling: Sampling) -> dict[str, Any]:
    """The settings of `_NEUTRAL` that are not neutral."""
    wanted = {"top_k": sampling.top_k or -1, "repetition_penalty": sampling.repetition_penalty}
    return {name: value for name, value in wanted.items() if value != _NEUTRAL[name]}

import itertools
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hostile_server import (
    Behaviour,
    answering,
    completion,
    dripping,
    ending,
    ending_in_the_middle,
    hostile_server,
    page,
    silent,
    unknowing,
)

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.engines import server as server_module
from em_kernels.one_shot.evaluation.engines.server import Server
from em_kernels.one_shot.interruption import Interrupted
from em_kernels.one_shot.policy.chat import ChatFormat
from em_kernels.one_shot.policy.generation import Generated, Request
from em_kernels.one_shot.policy.sampling import Sampling

_REQUESTS = [Request(i, f"question {i}", seed=2**40 + i) for i in range(5)]
_SAMPLING = Sampling(0.5, max_new_tokens=7)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_FIRST_DELAY", 0.001)


def _server(url: str, notes: list[str] | None = None, **settings: Any) -> Server:
    given = {"model": "m", "chat": ChatFormat(), "concurrency": 2, "timeout": 30.0, "key": None}
    return Server(url, note=(notes if notes is not None else []).append, **{**given, **settings})


def _complete(server: Server, requests: list[Request] = _REQUESTS, sampling: Sampling = _SAMPLING) -> list[Generated]:
    completions = server.complete(requests, sampling, description="", show_progress=False)
    return sorted(completions, key=lambda generated: generated.key)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "behaviour",
    [
        answering({"error": {"message": "out of memory"}}, 500),
        answering({"error": "slow down"}, 429, Retry_After="0"),
        answering("a text"),
        answering([]),
        answering({"choices": []}),
        answering({**completion("x"), "usage": None}),
        answering(completion("x", tokens="3")),
        answering({"choices": [{"message": {"content": ["x"]}, "finish_reason": "stop"}], "usage": {}}),
        page,
        ending,
        ending_in_the_middle,
    ],
)
def test_a_request_without_a_usable_answer_is_asked_again(behaviour: Behaviour) -> None:
    with hostile_server(behaviour, behaviour) as server:
        found = _complete(_server(server.url))
        assert found == [Generated(i, f"question {i}", 3, False) for i in range(5)]
        assert len(server.bodies) == 7


@pytest.mark.parametrize("behaviour", [silent, dripping])
def test_a_request_without_an_answer_in_time_is_asked_again(behaviour: Behaviour) -> None:
    with hostile_server(behaviour, behaviour) as server:
        found = _complete(_server(server.url, timeout=0.3))
        assert found == [Generated(i, f"question {i}", 3, False) for i in range(5)]
        # A slow machine may be late with other answers, too.
        assert len(server.bodies) >= 7


def test_a_server_is_left_alone_as_long_as_it_asks_for() -> None:
    with hostile_server(answering({}, 429, Retry_After="1")) as server:
        started = time.monotonic()
        assert len(_complete(_server(server.url), _REQUESTS[:1])) == 1
        assert time.monotonic() - started >= 1


def test_what_the_server_is_asked() -> None:
    chat = ChatFormat(system="Think.", stop=("END",))
    with hostile_server() as server:
        _complete(_server(f"{server.url}/", chat=chat, key="secret"), _REQUESTS[:1])
        [body] = server.bodies
        assert server.paths == ["/v1/chat/completions"]
        assert server.keys == ["Bearer secret"]
    assert body.pop("messages") == [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "question 0"},
    ]
    assert 0 <= body.pop("seed") < 2**31
    neutral = {"top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
    assert body == {"model": "m", "max_tokens": 7, "temperature": 0.5, "stop": ["END"], **neutral}


def test_greedy_is_temperature_0_and_filters_are_sent() -> None:
    sampling = Sampling(None, 7, top_p=0.9, top_k=5, repetition_penalty=1.1)
    with hostile_server() as server:
        _complete(_server(server.url), _REQUESTS[:1], sampling)
        [body] = server.bodies
        assert server.keys == [None]
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (0.0, 0.9, 5, 1.1)
    assert "stop" not in body


@pytest.mark.parametrize(
    ("answer", "text", "truncated"),
    [
        (completion("so 5", reason="length"), "so 5", True),
        (completion("so 5END", reason="stop"), "so 5", False),
        (completion("so 5END and", reason="length"), "so 5", False),
        (completion(None, reason="length"), "", True),
    ],
)
def test_what_an_answer_means(answer: dict[str, Any], text: str, truncated: bool) -> None:
    with hostile_server(answering(answer)) as server:
        found = _complete(_server(server.url, chat=ChatFormat(stop=("END",))), _REQUESTS[:1])
    assert found == [Generated(0, text, 3, truncated)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "model m\nis not here"}}, "HTTP 404, model m is not here$"),
        ({"detail": "nothing"}, "HTTP 404, nothing$"),
        ({"message": "nothing"}, "HTTP 404, nothing$"),
    ],
)
def test_a_request_that_is_wrong_is_not_asked_again(body: dict[str, Any], message: str) -> None:
    with hostile_server(answering(body, 404)) as server:
        with pytest.raises(UsageError, match=rf"^server http://127.0.0.1:\d+/v1/chat/completions: {message}"):
            _complete(_server(server.url, concurrency=1))
        assert len(server.bodies) == 1


def test_a_server_that_knows_no_top_k_is_asked_without_once_that_is_seen() -> None:
    notes: list[str] = []
    together = threading.Barrier(2, timeout=30)

    def unknowing_together(handler: Any) -> None:
        together.wait()
        unknowing(handler)

    with hostile_server(*[unknowing_together] * 2, otherwise=unknowing) as server:
        assert len(_complete(_server(server.url, notes))) == 5
        assert len(server.bodies) == 7
    assert len(notes) == 1
    assert "takes no top_k and no repetition_penalty" in notes[0]


def test_a_server_that_knows_no_top_k_cannot_be_asked_for_one() -> None:
    with (
        hostile_server(otherwise=unknowing) as server,
        pytest.raises(UsageError, match=r"HTTP 422, Unexpected fields .*top_k"),
    ):
        _complete(_server(server.url), sampling=Sampling(0.5, 7, top_k=4))


def test_a_server_that_is_not_there_is_given_up() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            UsageError, match=r"/v1/chat/completions: no connection \(Connection refused\), 6 times in a"
        ):
            _complete(_server(url))


def test_completions_before_the_server_dies_are_kept_and_no_more_are_asked_for() -> None:
    found: list[Generated] = []
    with hostile_server(*[_fine] * 3, otherwise=ending) as server:
        completions = _server(server.url, concurrency=1).complete(
            _REQUESTS, _SAMPLING, description="", show_progress=False
        )
        with pytest.raises(UsageError, match=r"the connection ended .*, 6 times in a row$"):
            found.extend(completions)
        assert [generated.key for generated in found] == [0, 1, 2]
        assert len(server.bodies) == 3 + 6


def test_completions_under_way_when_a_request_is_refused_come_before_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped: list[threading.Event] = []
    complete = Server._complete

    def observed(server: Server, request: Request, sampling: Sampling, event: threading.Event) -> Generated:
        stopped.append(event)
        return complete(server, request, sampling, event)

    def late(handler: Any) -> None:
        # By then the client knows that another request was refused.
        stopped[0].wait(30)
        _fine(handler)

    monkeypatch.setattr(Server, "_complete", observed)
    found: list[Generated] = []
    with hostile_server(late, late, answering({}, 404)) as server:
        completions = _server(server.url, concurrency=3).complete(
            _REQUESTS, _SAMPLING, description="", show_progress=False
        )
        with pytest.raises(UsageError, match="HTTP 404"):
            found.extend(completions)
        assert len(found) == 2
        assert len(server.bodies) == 3


def _fine(handler: Any) -> None:
    answering(completion("x"))(handler)


def _dripping_header(handler: Any) -> None:
    """Sends a byte of a header now and then, none of which is late."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nDate: ")
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b"x")


def _signalling(terminate: Callable[[], None], times: int, then: Behaviour) -> Behaviour:
    """Signals the main thread when both of two requests are under way."""
    together = threading.Barrier(2, timeout=60)

    def behave(handler: Any) -> None:
        if together.wait() == 0:
            for _ in range(times):
                terminate()
        together.wait()
        then(handler)

    return behave


@pytest.mark.parametrize(
    ("signals", "then", "seconds", "kept"),
    [(1, _fine, 0.0, 2), (1, _dripping_header, 20.0, 0), (2, _dripping_header, 0.0, 0)],
    ids=["answers", "no answers in time", "a second signal"],
)
def test_completions_under_way_at_a_signal_are_waited_for_until_their_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
    terminate: Callable[[], None],
    signals: int,
    then: Behaviour,
    seconds: float,
    kept: int,
) -> None:
    """So many seconds pass between two looks at the clock."""
    clock = itertools.count(0.0, seconds)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    found: list[Generated] = []
    with hostile_server(*[_signalling(terminate, signals, then)] * 2) as server:
        completions = _server(server.url).complete(_REQUESTS, _SAMPLING, description="", show_progress=False)
        with pytest.raises(Interrupted):
            found.extend(completions)
        assert not server.over.is_set()
        assert len(found) == kept
        # No more is asked for.
        assert len(server.bodies) == 2


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "", "http://[::1/v1", "http://host:port", "http://host:0"]
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UsageError, match="expected an address such as http://localhost:8000/v1"):
        _server(url)


def test_an_address_with_a_password_is_not_shown() -> None:
    with pytest.raises(UsageError, match=r"^endpoint has a user name before host, expected none$"):
        _server("http://user:secret@host/v1")


@pytest.mark.parametrize("key", ["secret\n", "secret\rmore", "secrét", "secret\u2028"])
def test_a_key_that_cannot_be_sent_is_not_shown(key: str) -> None:
    with pytest.raises(UsageError, match=r"expected printable ASCII$") as raised:
        _server("http://localhost", key=key)
    assert "secr" not in str(raised.value)


def test_a_template_is_the_servers() -> None:
    with pytest.raises(UsageError, match="a server formats chats by its own template"):
        _server("http://localhost", chat=ChatFormat(template="plain"))


def test_several_are_asked_at_once() -> None:
    together = threading.Barrier(3, timeout=30)

    def waiting(handler: Any) -> None:
        together.wait()
        _fine(handler)

    with hostile_server(*[waiting] * 3) as server:
        assert len(_complete(_server(server.url, concurrency=3), _REQUESTS[:3])) == 3
    assert not together.broken

import time
from typing import Any

import pytest
from hostile_server import Behaviour, answering, dripping, ending, ending_in_the_middle, hostile_server, page, silent

from em_kernels.one_shot.evaluation.engines.exchange import RefusedError, UnavailableError, post_json


def test_the_body_of_an_error_has_a_time_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def late(handler: Any) -> None:
        clock[0] = 100.0
        dripping(handler, status=500)

    with hostile_server(late) as server:
        with pytest.raises(UnavailableError, match=r"^HTTP 500"):
            post_json(server.url, {}, key=None, timeout=30)
        assert not server.over.is_set()


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (silent, "no answer within 0.2 s$"),
        # A byte now and then is no answer, however long they come.
        (dripping, "no answer within 0.2 s$"),
        (ending, "the connection ended \\(Remote end closed connection without response\\)$"),
        (ending_in_the_middle, "the answer is no JSON object: '\\{\"choices\": \\['$"),
        (page, "the answer is no JSON object: '<html>Welcome</html>'$"),
        (answering({"error": {"message": "out of\nmemory"}}, 500), "HTTP 500, out of memory$"),
        (answering([1], 503), "HTTP 503, \\[1\\]$"),
    ],
)
def test_why_there_is_no_answer(behaviour: Behaviour, reason: str) -> None:
    timeout = 0.2 if behaviour in (silent, dripping) else 30
    with hostile_server(behaviour) as server, pytest.raises(UnavailableError, match=f"^{reason}"):
        post_json(server.url, {}, key=None, timeout=timeout)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_goes_to_no_other_host(status: int) -> None:
    with hostile_server() as other, hostile_server(answering({}, status, Location=other.url)) as server:
        with pytest.raises(RefusedError, match=f"^HTTP {status}, the server redirects to {other.url}$"):
            post_json(server.url, {}, key="secret", timeout=30)
        assert other.gets == other.keys == []


def test_an_answer_is_its_object() -> None:
    with hostile_server(answering({"a": ["ü"]})) as server:
        assert post_json(server.url, {}, key=None, timeout=30) == {"a": ["ü"]}

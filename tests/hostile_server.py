"""A server on the loopback address whose answers are written down beforehand, one after another."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# A client that waits for what never comes does not hold up the tests for ever.
_SECONDS_AT_MOST = 60

Behaviour = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Reads a request, and behaves as the server's next behaviour says."""

    server: "HostileServer"
    body: dict[str, Any]

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.changing:
            self.server.bodies.append(self.body)
            self.server.paths.append(self.path)
            self.server.keys.append(self.headers.get("Authorization"))
            behave = self.server.behaviours.pop(0) if self.server.behaviours else self.server.otherwise
        with contextlib.suppress(ConnectionError):
            behave(self)

    def do_GET(self) -> None:
        self.server.gets.append(self.path)
        self.send(200, b"{}")

    def send(self, status: int, content: bytes, *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class HostileServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behaviours: list[Behaviour], otherwise: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviours, self.otherwise = behaviours, otherwise
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.gets: list[str] = []
        self.keys: list[str | None] = []
        self.changing = threading.Lock()
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextlib.contextmanager
def hostile_server(*behaviours: Behaviour, otherwise: Behaviour | None = None) -> Iterator[HostileServer]:
    """A server that behaves so on its first requests, and otherwise on all that follow, which it answers by default.

    Answers that never end go on until the block ends, or until a minute has passed: the server is `over` then.
    """
    with HostileServer(list(behaviours), otherwise or fine) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        end = threading.Timer(_SECONDS_AT_MOST, server.over.set)
        end.daemon = True
        end.start()
        try:
            yield server
        finally:
            end.cancel()
            server.over.set()
            server.shutdown()


def completion(text: str | None, *, reason: str = "stop", tokens: Any = 3) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
        "usage": {"completion_tokens": tokens},
    }


def fine(handler: Handler) -> None:
    """Answers with the question."""
    answering(completion(handler.body["messages"][-1]["content"]))(handler)


def answering(value: Any, status: int = 200, **headers: str) -> Behaviour:
    return lambda handler: handler.send(status, json.dumps(value).encode(), **headers)


def page(handler: Handler) -> None:
    handler.send(200, b"<html>Welcome</html>")


def ending(handler: Handler) -> None:
    """Ends the connection without a word."""
    handler.close_connection = True


def ending_in_the_middle(handler: Handler) -> None:
    handler.send(200, b'{"choices": [', length=1000)
    handler.close_connection = True


def silent(handler: Handler) -> None:
    handler.server.over.wait()


def dripping(handler: Handler, status: int = 200) -> None:
    """Sends a byte now and then, and never all."""
    handler.send(status, b"", length=10_000)
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b" ")


def unknowing(handler: Handler) -> None:
    """Refuses every setting that OpenAI does not have."""
    extra = sorted(handler.body.keys() & {"top_k", "repetition_penalty"})
    if extra:
        answering({"detail": f"Unexpected fields in the request: {extra}"}, 422)(handler)
    else:
        fine(handler)

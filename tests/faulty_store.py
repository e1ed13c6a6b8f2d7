"""A real S3-compatible server (moto) on loopback, behind a proxy that injects faults and records the requests."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY, SECRET = "AKIAGOODGOODGOODGOOD", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYgoodsecret"
DENIED = """<?xml version="1.0" encoding="UTF-8"?><Error><Code>InvalidAccessKeyId</Code>
<Message>The AWS Access Key Id you provided does not exist: {key}</Message>
<AWSAccessKeyId>{key}</AWSAccessKeyId></Error>"""
SLOW_DOWN = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>'
)


@dataclass
class Fault:
    """A fault for the first `times` requests of a method whose path matches.

    Attributes:
        kind: late (no answer before the client's time-out), busy (503), slow (the body trickles), cut (the body ends
            early), lost (the connection is reset), whole (range requests are unsupported).
        at: for cut and busy: first byte of the object that is not sent; only requests that include such bytes are hit.
    """

    kind: str
    method: str = "GET"
    path: str = r".*\.tar"
    times: float = float("inf")
    at: int | None = None
    until: int = 2**60


@dataclass
class Store:
    """The proxy's address, its faults, and the received requests: (method, path, range or None)."""

    port: int
    behind: tuple[str, int]
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str, tuple[int, int] | None]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> dict[str, str]:
        return {"endpoint_url": self.url, "key": KEY, "secret": SECRET}

    def fault_of(self, method: str, path: str, part: tuple[int, int] | None) -> Fault | None:
        with self.lock:
            self.seen.append((method, path, part))
            for fault in self.faults:
                start, stop = part or (0, 2**60)
                hit = fault.at is None or (stop > fault.at and start < fault.until)
                if fault.times > 0 and fault.method == method and hit and re.fullmatch(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def requested(self, method: str, pattern: str = r".*\.tar") -> list[tuple[int, int] | None]:
        return [part for verb, path, part in self.seen if verb == method and re.fullmatch(pattern, path)]


class Handler(BaseHTTPRequestHandler):
    """Forwards requests to the server behind `store`, or answers with a fault; subclasses set `store`."""

    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # the client gave up, as expected
            super().handle()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        body, part = self.body(), self.part()
        fault = self.store.fault_of(self.command, path, part)
        kind = fault.kind if fault else ""
        if kind == "late":
            time.sleep(1.5)
            self.close_connection = True
            return
        if kind == "lost":
            self.close_connection = True
            self.connection.close()
            return
        named = re.search(r"Credential=([^/]*)/", self.headers.get("Authorization", ""))
        if kind == "busy":
            self.send(503, [], SLOW_DOWN.encode())
        elif named and named[1] != KEY:
            self.send(403, [], DENIED.format(key=named[1]).encode())
        else:
            self.forward(body, fault, part)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def part(self) -> tuple[int, int] | None:
        result = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (int(result[1]), int(result[2]) + 1) if result else None

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def forward(self, body: bytes, fault: Fault | None, part: tuple[int, int] | None) -> None:
        dropped = (
            "expect",
            "transfer-encoding",
            "connection",
            *(("range",) if fault and fault.kind == "whole" else ()),
        )
        headers = {key: value for key, value in self.headers.items() if key.lower() not in dropped}
        headers["Content-Length"] = str(len(body))
        behind = http.client.HTTPConnection(*self.store.behind, timeout=30)
        behind.request(self.command, self.path, body or None, headers)
        result = behind.getresponse()
        data = result.read()
        behind.close()
        kept = [
            (key, value) for key, value in result.getheaders() if key.lower() not in ("connection", "date", "server")
        ]
        self.send(result.status, kept, data, fault, part)

    def send(
        self, status: int, headers: list, data: bytes, fault: Fault | None = None, part: tuple | None = None
    ) -> None:
        self.send_response(status)
        lengths = [value for key, value in headers if key.lower() == "content-length"]
        for key, value in headers:
            if key.lower() not in ("content-length", "transfer-encoding"):
                self.send_header(key, value)
        length = lengths[0] if self.command == "HEAD" and lengths else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.kind == "cut":
            start = part[0] if part else 0
            end = len(data) // 2 if fault.at is None else max(0, fault.at - start)
            self.wfile.write(data[:end])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(1)
        elif fault and fault.kind == "slow":
            step = max(1, len(data) // 4)
            for at in range(0, len(data), step):
                self.wfile.write(data[at : at + step])
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.wfile.write(data)


@contextmanager
def running_store() -> Iterator[Store]:
    """Run moto and the proxy in front of it, on free ports of loopback."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    store = Store(0, moto.get_host_and_port())
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfStore", (Handler,), {"store": store}))
    proxy.daemon_threads = True
    store.port = proxy.server_port
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        proxy.shutdown()
        proxy.server_close()
        moto.stop()

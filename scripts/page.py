"""A page to view a selection and decide: `python scripts/page.py selection=DIR`, or `make page SELECTION=DIR`."""

from __future__ import annotations

import base64
import contextvars
import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from prune.decisions import Decision, Edits, Settings, open_decision, save
from prune.kept import open_selection
from prune.page_arrays import page_arrays
from prune.pool import Selection
from prune.selection import selection_table
from report.decision_page import (
    Shown,
    Thumbnails,
    bundle,
    decision_page,
    names_of,
    selection_columns,
    write_decision_page,
)
from runtime.application import run
from runtime.artefacts import plain
from runtime.errors import UserError
from runtime.redaction import redacted
from scripts.export import FORMS, chosen_subset
from scripts.export import write as write_export

HOST = "127.0.0.1"
#: Largest number of bytes of a request; the address of an image.
MOST_BYTES, IMAGE = 8_000_000, re.compile(r"/image/(\d{1,12})\.png")
#: Cosine of near-duplicates if the method defines none.
DUPLICATE = 0.98


# ---------------------------------------------------------------- the file


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The options of configs/page, checked.

    Raises:
        UserError: an option is invalid.
    """
    options = plain(cfg.page)
    for name, low, high in (
        ("port", 1, 65535), ("tile", 8, 512), ("embedded", 1, 100_000), ("thumbnails", 1, 100_000_000),
        ("neighbours", 1, 64),
    ):  # fmt: skip
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UserError(f"page.{name}={value}: give a whole number from {low} to {high}")
    duplicate = options["duplicate"]
    if duplicate is not None and not (isinstance(duplicate, (int, float)) and -1 <= duplicate <= 1):
        raise UserError(f"page.duplicate={duplicate} is not a cosine: give a number between -1 and 1, or null")
    return options


def content(cfg: DictConfig, decision: Decision) -> tuple[Shown, Thumbnails]:
    """The content of a selection's page, and the number of thumbnails."""
    options, kept, table = checked(cfg), decision.kept, decision.table
    name, duplicate = kept.directory.resolve().name, options["duplicate"]
    if duplicate is None:
        own = kept.inputs["method"].get("duplicate_similarity")
        duplicate = DUPLICATE if own is None else own
    arrays = page_arrays(
        name, decision.pool.embeddings, decision.pool.readable, table["kept"].to_numpy(),
        table["scene"].fillna("").to_numpy(dtype=str), options["neighbours"], float(duplicate), kept.runs,
    )  # fmt: skip
    columns = {
        "x": arrays.plane[:, 0], "y": arrays.plane[:, 1], "neighbours": arrays.neighbours, "cosines": arrays.cosines,
        "group": arrays.group, "nearest_kept": arrays.nearest_kept, "nearest_cosine": arrays.nearest_cosine,
    }  # fmt: skip
    metadata = {
        "selection": name, "corpus": kept.corpus.fingerprint, "duplicate": duplicate,
        "entropy_threshold": kept.summary.get("entropy_threshold"),
    }  # fmt: skip
    title = f"{kept.corpus.name}, {kept.summary['method']}: kept and dropped images, with reasons"
    shown = Shown(title, metadata, table, kept.corpus.manifest, columns, kept.corpus.images)
    return shown, Thumbnails(options["tile"], options["embedded"], options["thumbnails"])


# ---------------------------------------------------------------- the server


class Session:
    """Answers the server's requests, one at a time, because selections and exports use all cores.

    Args:
        html: of the page.
    """

    def __init__(self, cfg: DictConfig, decision: Decision, html: str) -> None:
        self.cfg, self.decision = cfg, decision
        self.page = live(html, decision).encode()
        self._alone = threading.Lock()
        self._latest: tuple[Settings, Selection] = (Settings(), decision.as_it_stands())

    def selection(self, settings: Settings) -> Selection:
        """The selection for some settings; the latest one is cached."""
        if not self.decision.changed(settings):
            return self.decision.as_it_stands()
        if self._latest[0] != settings:
            self._latest = (settings, self.decision.select(settings))
        return self._latest[1]

    def select(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The selection for other settings, in the format of the page."""
        settings, started = Settings.of(given), time.perf_counter()
        with self._alone:
            selection = self.selection(settings)
        table = selection_table(self.decision.pool, selection, np.zeros(len(self.decision.pool), np.float32))
        columns, data = bundle(selection_columns(table), {})
        threshold = selection.diagnostics.get("entropy_threshold")
        return {
            **names_of(table), "columns": columns, "data": base64.b64encode(data).decode(),
            "entropy_threshold": threshold, "seconds": time.perf_counter() - started,
        }  # fmt: skip

    def save(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Write a new selection directory from the settings and the manual moves."""
        settings, edits = Settings.of(given), Edits.of(given, len(self.decision.pool))
        with self._alone:
            return {"selection": str(save(self.decision, settings, self.selection(settings), edits))}

    def export(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`save`, then export the kept images in a format of scripts/export.py, below results/export."""
        form = given.get("to")
        if form not in FORMS:
            raise UserError(f"to={form} is unknown: choose from {', '.join(FORMS)}")
        directory = Path(self.save(given)["selection"])
        target = Path(self.cfg.results) / "export" / f"{directory.resolve().name}-{form}"
        with self._alone:
            if not target.is_dir() or not any(target.iterdir()):  # a folder appears only when complete
                cfg = OmegaConf.merge(self.cfg, {"selection": str(directory), "to": form})
                write_export(cfg, chosen_subset(cfg), target)
        return {"selection": str(directory), "export": str(target)}

    def image(self, row: int) -> bytes:
        """An image of the corpus as PNG."""
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(self.decision.kept.corpus.images[row])).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def live(html: str, decision: Decision) -> str:
    """The page of a server, including its controls for changes."""
    summary = decision.kept.summary
    given = {"ratio": summary["ratio"], "uniformity": decision.uniformity, "fixed": decision.fixed, "forms": FORMS}
    return html.replace("<html ", f'<html data-live="{escape(json.dumps(given), quote=True)}" ', 1)


class Server(ThreadingHTTPServer):
    """Ends with its command, and prints nothing if a browser does not wait for its answer."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests to a session; `handler_of` sets the two attributes.

    Attributes:
        context: holds the command's engine and run folder.
    """

    session: Session
    context: contextvars.Context
    protocol_version = "HTTP/1.1"  # otherwise every thumbnail needs a new connection

    def log_message(self, *_: Any) -> None:
        """Nothing: the browser shows what happens."""

    def do_GET(self) -> None:
        if not self._own_host():
            self._answer(HTTPStatus.FORBIDDEN, {"error": "another host"})
        elif self.path.partition("?")[0] == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.session.page)
        elif (result := IMAGE.fullmatch(self.path)) and int(result[1]) < len(self.session.decision.pool):
            self._send(HTTPStatus.OK, "image/png", self.session.image(int(result[1])), "max-age=3600")
        else:
            self._answer(HTTPStatus.NOT_FOUND, {"error": f"{self.path} is not here"})

    def do_POST(self) -> None:
        session = self.session
        actions: dict[str, Callable] = {"select": session.select, "save": session.save, "export": session.export}
        action = actions.get(self.path.removeprefix("/api/"))
        try:
            given = self._given()
            if not self._own_host() or self.headers.get("X-Page") != "1":
                self._answer(HTTPStatus.FORBIDDEN, {"error": "this request does not come from the page"})
            elif action is None:
                self._answer(HTTPStatus.NOT_FOUND, {"error": f"{self.path} is not here"})
            else:
                self._answer(HTTPStatus.OK, self.context.copy().run(_acted, action, given))
        except UserError as error:
            self._answer(HTTPStatus.BAD_REQUEST, {"error": redacted(str(error))})
        except OSError as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": redacted(str(error))})

    def _own_host(self) -> bool:
        return self.headers.get("Host", "").partition(":")[0] in (HOST, "localhost")

    def _given(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self.close_connection = True
            raise UserError(f"give a request of at most {MOST_BYTES} bytes")
        try:
            given = json.loads(self.rfile.read(int(length)))
        except ValueError:
            raise UserError("the request is not JSON") from None
        if not isinstance(given, dict):
            raise UserError("give a JSON object")
        return given

    def _answer(self, status: HTTPStatus, value: Mapping[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: HTTPStatus, kind: str, data: bytes, cache: str = "no-store") -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind), ("Content-Length", str(len(data))), ("Cache-Control", cache),
            ("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def handler_of(session: Session) -> type[BaseHTTPRequestHandler]:
    """Handler of the requests to a session.

    Pages of other sites are refused: the host must be this server, and requests that change something carry a header
    that other sites cannot send.
    """
    return type("Handler", (Handler,), {"session": session, "context": contextvars.copy_context()})


def _acted(action: Callable[[Mapping[str, Any]], dict[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    torch.set_flush_denormal(True)  # a setting per thread; without it the last bits differ from those of the command
    return action(given)


def main(cfg: DictConfig) -> None:
    options = checked(cfg)
    decision = open_decision(open_selection(cfg.selection))
    shown, thumbnails = content(cfg, decision)
    if options["static"]:
        directory = Path(cfg.results) / "page" / decision.kept.directory.resolve().name
        print(f"page: {write_decision_page(directory, shown, thumbnails)}")
        return
    session = Session(cfg, decision, decision_page(shown, replace(thumbnails, embedded=0), beside=False))
    try:
        server = Server((HOST, options["port"]), handler_of(session))
    except OSError as error:
        raise UserError(f"page.port={options['port']}: cannot listen there, give another port: {error}") from error
    print(f"page: http://{HOST}:{options['port']}/", flush=True)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    run(main)

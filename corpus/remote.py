"""Listing, inspecting, reading and writing of files behind URLs, with repeated requests.

Temporary failures (a time-out, a lost connection, 429, 5xx, a body that ends early) are requested again, after a pause
that doubles each time; permanent ones (403, 404) are not. Nothing that this module writes contains a credential.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import os
import tarfile
import tempfile
import time
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import fsspec
import numpy as np
from omegaconf import OmegaConf

from runtime.errors import UserError
from runtime.notices import notice
from runtime.parallel import in_threads
from runtime.progress import progress
from runtime.redaction import hide, public, redacted, secret_values

#: Seconds before the first repetition; each further pause is twice as long, up to the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
#: Number of bytes per request: of the first one, and at most, when a file is read on sequentially.
FIRST_BLOCK, BLOCK = 2**16, 2**23
#: Largest gap in bytes that is read and discarded to save a separate request.
GAP = 2**19
#: Lowest speed in bytes per second; a slower request is cancelled and repeated.
SLOWEST = 2**16
#: An offset beyond the end of any file.
NOWHERE = 2**63
#: Number of concurrent requests when many files are inspected or written.
AT_ONCE = 8
#: HTTP status codes after which repeating the request may help.
PASSING_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504, 509))
#: Schemes of object stores, in which folders are only prefixes of names.
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss"))
#: The extra of this project that contains the drivers.
EXTRA = "remote"

_PASSING_ERRORS = frozenset(
    getattr(errno, name, -1)
    for name in (
        *("EBUSY", "EREMOTEIO", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ETIMEDOUT", "EPIPE", "EAGAIN"),
        *("ENETUNREACH", "EHOSTUNREACH", "ENETDOWN"),
    )
)
#: Names of error classes of drivers; names are used so that no driver need be installed.
_NOT_TRUSTED = {"SSLError", "SSLCertVerificationError", "ClientSSLError", "ClientConnectorCertificateError"}
_LATE = {"TimeoutError", "ReadTimeoutError", "ConnectTimeoutError", "Timeout"}
_ENDED_EARLY = {"ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError"}
_LOST = {"ClientConnectionError", "HTTPClientError", "EndpointConnectionError", "ConnectionError", "TransportError"}
_GARBLED = {"ResponseParserError", "ProtocolError", "ChunkedEncodingError"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError"}

Answer = TypeVar("Answer")


class Unreachable(OSError):
    """The network or the server failed at every attempt."""


class Refused(OSError):
    """The server refused the request for another reason than a missing file or a missing permission."""


class Cut(tarfile.ReadError):
    """At every attempt, a file ended before its reported size was reached.

    Attributes:
        data: the part of the requested bytes that exists; None: the connection ended before it could be determined.
    """

    def __init__(self, message: str, data: bytes | None = None) -> None:
        super().__init__(message)
        self.data = data


class _Short(Exception):
    def __init__(self, data: bytes) -> None:
        super().__init__("the answer is too short")
        self.data = data


@dataclass(frozen=True)
class Access:
    """Settings for the access to files behind URLs; they do not change any result.

    Attributes:
        retries: how often a request is repeated.
        timeout: seconds to wait for a connection, an answer, or the next bytes of an answer.
        storage: options of the fsspec file system, such as `endpoint_url` or `anon`; they may contain secrets.
        tally: path of a file to which a line is added for each repeated request; "": requests are not counted.
    """

    retries: int = 5
    timeout: float = 30.0
    storage: Mapping[str, Any] | None = field(default=None, repr=False)
    tally: str = ""


def access_of(cfg: Any) -> Access:
    """Access settings of a command's configuration (OmegaConf): those of its corpus if that consists of shards."""
    result = {name: OmegaConf.select(cfg, f"corpus.{name}") for name in ("retries", "timeout")}
    own = {name: value for name, value in result.items() if value is not None}
    options = [OmegaConf.select(cfg, key) for key in ("storage", "corpus.storage")]
    merged = OmegaConf.to_container(OmegaConf.merge(*(part or {} for part in options)), resolve=True)
    return Access(**own, storage=merged or None)


def is_remote(url: str) -> bool:
    return "://" in url and not url.startswith("file://")


def as_file(url: str) -> str:
    """A URL without its query, from which names are made."""
    return url.split("?")[0] if is_remote(url) else url


# ------------------------------------------------------------------------------------------------------ file systems


def opened_system(url: str, access: Access) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path of the URL in it.

    Raises:
        UserError: the driver is not installed, or it does not accept the options.
    """
    hide(secret_values({"storage": access.storage or {}}))
    url, user = _without_user(url)
    scheme = url.partition("://")[0] if "://" in url else "file"
    try:
        kind = fsspec.get_filesystem_class(scheme)
        options = {**_patient_options(scheme, access), **kind._get_kwargs_from_urls(url), **user}
        system = _system(scheme, access.timeout, json.dumps({**options, **(access.storage or {})}, sort_keys=True))
        return system, kind._strip_protocol(url)
    except ImportError as error:
        raise UserError(
            f"{public(url)} needs a driver that is not installed ({error}): pip install '.[{EXTRA}]' installs those "
            "for S3 and Google Cloud Storage"
        ) from None
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{public(url)} cannot be opened ({_first_line(error)}): check the URL and storage=…") from None


@functools.lru_cache(maxsize=64)
def _system(scheme: str, timeout: float, options: str) -> fsspec.AbstractFileSystem:
    """The file system of a scheme, shared by all threads, because fsspec would open connections for each thread."""
    more: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        more["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
            **json.loads(options).get("client_kwargs", {}),
        }
    system = fsspec.filesystem(scheme, **{**json.loads(options), **more})
    if scheme in ("s3", "s3a"):
        system.retries = 1  # repetitions by the driver would multiply those of this module
    return system


def _patient_options(scheme: str, access: Access) -> dict[str, Any]:
    """Options that limit a driver's waiting time, make it try only once, and switch off its cache of listings."""
    if scheme not in ("s3", "s3a"):
        return {"use_listings_cache": False} if scheme in ("http", "https", "gs", "gcs") else {}
    waits = {"connect_timeout": access.timeout, "read_timeout": access.timeout, "retries": {"total_max_attempts": 1}}
    return {"use_listings_cache": False, "config_kwargs": {**waits, **(access.storage or {}).get("config_kwargs", {})}}


def _without_user(url: str) -> tuple[str, dict[str, str]]:
    """Convert `s3://KEY:SECRET@bucket/…` into a URL that the driver accepts, and options with the credentials."""
    scheme, _, rest = url.partition("://")
    cleaned = public(url)
    if scheme not in ("s3", "s3a") or cleaned == url or "@" not in rest:
        return url, {}
    bucket = cleaned.partition("://")[2]
    user, _, secret = (
        rest[: len(rest) - len(bucket)].rstrip("@").partition(":") if rest.endswith(bucket) else ("", "", "")
    )
    hide([user, secret])
    return f"{scheme}://{bucket}", {"key": unquote(user), "secret": unquote(secret)}


def _called(system: fsspec.AbstractFileSystem, deadline: float | None, name: str, *given: Any, **options: Any) -> Any:
    """Call a method of a file system; the call is cancelled after `deadline` seconds if the driver is asynchronous."""
    method = getattr(system, f"_{name}", None)
    if not (system.async_impl and asyncio.iscoroutinefunction(method)):
        return getattr(system, name)(*given, **options)

    async def limited() -> Any:
        return await asyncio.wait_for(method(*given, **options), deadline)

    return fsspec.asyn.sync(system.loop, limited)


# ---------------------------------------------------------------------------------------------------------- patience


def patiently(url: str, access: Access, ask: Callable[[], Answer]) -> Answer:
    """Make a request, and repeat it as long as the failure may be temporary; returns the answer.

    Raises:
        FileNotFoundError: the file does not exist.
        PermissionError: access is denied.
        Unreachable: the last attempt failed as well; the message has its error.
        Cut: the answer of the last attempt ended early as well.
        Refused: the server gave any other negative answer.
    """
    attempt = 0
    while True:
        try:
            return ask()
        except UserError:
            raise
        except Exception as error:
            trouble = passing_trouble(error)
            if trouble is None or attempt >= access.retries:
                raise _translated(url, error, trouble) from None
            _count(access, trouble)
        time.sleep(_pause(url, attempt))
        attempt += 1


def passing_trouble(error: BaseException) -> str | None:
    """Short description of a failure if repeating the request may help; otherwise None."""
    chain = list(_chain(error))
    kinds = [{kind.__name__ for kind in type(each).__mro__} for each in chain]
    if any(names & _NOT_TRUSTED for names in kinds):
        return None
    if any(isinstance(each, _Short) or names & _ENDED_EARLY for each, names in zip(chain, kinds, strict=True)):
        return "ended early"  # of a successful answer
    status = next((result for result in map(_status, chain) if result is not None), None)
    if status is not None:
        return f"status {status}" if status in PASSING_STATUS else None
    for each, names in zip(chain, kinds, strict=True):
        if names & _LATE:
            return "time-out"
        if names & _LOST or names & _GARBLED or (isinstance(each, OSError) and each.errno in _PASSING_ERRORS):
            return "no connection"
    return None


def _translated(url: str, error: BaseException, trouble: str | None) -> Exception:
    where = public(url)
    if trouble == "ended early":
        return Cut(f"{where} ends early", next((each.data for each in _chain(error) if isinstance(each, _Short)), None))
    if trouble is not None:
        return Unreachable(f"{where}: {trouble}")
    chain = list(_chain(error))
    misfit = next((each for each in chain if isinstance(each, TypeError)), None)
    if misfit is not None:  # the HTTP driver reports this as a missing file
        return Refused(f"{_first_line(misfit)}: does the driver know all options in storage?")
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    statuses = {_status(each) for each in chain}
    if statuses & {401, 403} or "PermissionError" in names or names & _NO_CREDENTIALS:
        return PermissionError(f"{where}: no permission, or no credentials")
    if 404 in statuses or "FileNotFoundError" in names:
        return FileNotFoundError(where)
    return Refused(_first_line(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status(error: BaseException) -> int | None:
    """The HTTP status code in an error of a driver."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        result = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return {"SlowDown": 503, "RequestTimeout": 408}.get(str(answer.get("Error", {}).get("Code")), result)
    values = (getattr(error, name, None) for name in ("status", "code"))
    return next((int(value) for value in values if str(value).isdigit() and 100 <= int(value) < 600), None)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return redacted(text.splitlines()[0]) if text else type(error).__name__


def _pause(url: str, attempt: int) -> float:
    """Seconds to wait; the pause varies so that processes that failed at once do not repeat their requests at once."""
    generator = np.random.default_rng([zlib.crc32(url.encode()), attempt, os.getpid()])
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * (0.5 + 0.5 * generator.random())


def new_tally() -> str:
    """Create a file for `Access.tally`, to which all processes of this machine append."""
    descriptor, path = tempfile.mkstemp(prefix="repeated-requests-")
    os.close(descriptor)
    return path


def _count(access: Access, trouble: str) -> None:
    if access.tally:
        with contextlib.suppress(OSError):  # the file does not exist on other machines
            descriptor = os.open(access.tally, os.O_WRONLY | os.O_APPEND)
            os.write(descriptor, f"{trouble}\n".encode())
            os.close(descriptor)


def repeated_since(path: str) -> str:
    """A line about the requests that were repeated since the last call; "" if there were none."""
    try:
        result = Counter(Path(path).read_text(encoding="ascii").split("\n")[:-1])
        os.truncate(path, 0)
    except OSError:
        return ""
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(result.items()))
    return f"{result.total():,} requests were repeated: {kinds}" if result else ""


# ------------------------------------------------------------------------------------------------ looking and listing


def metadata_of(url: str, access: Access) -> dict[str, Any]:
    """Metadata of a file from its file system: at least `size`, which is None if the size is unknown.

    Raises:
        the errors of `patiently`; a folder counts as a missing file.
    """
    system, path = opened_system(url, access)
    result = patiently(url, access, lambda: _called(system, 2 * access.timeout, "info", path))
    if result.get("type") == "directory":
        raise FileNotFoundError(public(url))
    return result


def is_pattern(url: str) -> bool:
    """Whether a URL is a pattern: it has a * or a ? that does not begin a query."""
    return "*" in url or ("?" in url and "=" not in url and not url.startswith(("http://", "https://")))


def is_folder(url: str, access: Access) -> bool:
    """Whether a URL names a folder; an HTTP URL does so only if it ends with a slash.

    Raises:
        the errors of `patiently`.
    """
    if url.endswith("/"):
        return True
    system, path = opened_system(url, access)
    try:
        return patiently(url, access, lambda: _called(system, 2 * access.timeout, "info", path))["type"] == "directory"
    except FileNotFoundError:
        return False


def files_below(url: str, access: Access, suffix: str) -> dict[str, dict[str, Any]]:
    """URLs and metadata of the files that match a pattern, or that are in a folder and have this suffix; sorted.

    Raises:
        the errors of `patiently`.
    """
    system, path = opened_system(url, access)
    try:
        if is_pattern(url):
            result = patiently(url, access, lambda: _called(system, None, "glob", path, detail=True)).values()
        else:
            result = patiently(url, access, lambda: _called(system, None, "ls", path, detail=True))
    except FileNotFoundError:
        return {}
    files = [entry for entry in result if entry["type"] == "file" and entry["name"].split("?")[0].endswith(suffix)]
    return {_whole_url(url, entry["name"]): entry for entry in sorted(files, key=lambda entry: entry["name"])}


def _whole_url(url: str, name: str) -> str:
    """The name of a file in a file system as a URL, with the user of the requested URL."""
    if "://" in name:
        return name
    scheme, _, rest = url.partition("://")
    user = rest.rpartition("@")[0] if _without_user(url)[1] else ""
    return f"{scheme}://{user}@{name}" if user else f"{scheme}://{name}"


def read_whole(url: str, access: Access) -> bytes:
    """The bytes of a small file.

    Raises:
        the errors of `patiently`.
    """
    system, path = opened_system(url, access)
    return patiently(url, access, lambda: _called(system, 2 * access.timeout, "cat_file", path))


# ------------------------------------------------------------------------------------------------------------ reading


def stretches_of(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join parts of a file, (start, end), that are close to each other into stretches of up to `BLOCK` bytes."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(parts):
        if joined and start <= joined[-1][1] + GAP and max(end, joined[-1][1]) - joined[-1][0] <= BLOCK:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


class RemoteFile:
    """A file behind a URL that is read mostly sequentially, with occasional jumps, in few requests.

    Blocks grow as long as reading is sequential. If it is known what will be read, each stretch is one request.

    Args:
        url: URL of the file.
        access: access settings.
        size: size in bytes; None: the server does not report it, and the whole file is read at once.
        stretches: the stretches that will be read, from `stretches_of`.
    Raises:
        the errors of `patiently`, by `read`.
    """

    def __init__(self, url: str, access: Access, size: int | None, stretches: Sequence[tuple[int, int]] = ()) -> None:
        self._url, self._access = url, access
        self._system, self._path = opened_system(url, access)
        self._stretches, self._starts = list(stretches), [start for start, _ in stretches]
        self._pieces: list[tuple[int, bytes]] = []
        self._at, self._next, self._block = 0, 0, FIRST_BLOCK
        self._bad = NOWHERE  # requests for bytes up to this offset end early
        if size is None:
            self._pieces = [(0, read_whole(url, access))]
            size = len(self._pieces[0][1])
        self._size = int(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + {0: 0, 1: self._at, 2: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        end = self._size if count is None or count < 0 else min(self._size, self._at + count)
        parts = []
        while self._at < end:
            start, data = self._piece(end)
            part = data[self._at - start : end - start]
            parts.append(part)
            self._at += len(part)
        return b"".join(parts)

    def close(self) -> None:
        self._pieces = []

    def _piece(self, end: int) -> tuple[int, bytes]:
        """A piece that contains the byte at the current position; `end` is the end of the requested bytes."""
        for start, data in self._pieces:
            if start <= self._at < start + len(data):
                return start, data
        planned = bisect_right(self._starts, self._at) - 1
        if planned >= 0 and self._at < self._stretches[planned][1]:
            stop = self._stretches[planned][1]
        else:
            goes_on = self._next <= self._at <= self._next + GAP
            self._block = min(BLOCK, 4 * self._block) if goes_on else FIRST_BLOCK
            stop = max(self._at + self._block, min(end, self._at + BLOCK))
        stop = self._before_bad(min(stop, self._size))
        try:
            data = self._fetched(self._at, stop)
        except Unreachable:
            if stop <= end:
                raise
            if planned >= 0:  # the rest of the stretch may still be read
                self._stretches[planned] = (self._starts[planned], self._at)
            data = self._fetched(self._at, end)
        self._next = self._at + len(data)
        self._pieces = [*self._pieces[-1:], (self._at, data)]
        return self._pieces[-1]

    def _before_bad(self, stop: int) -> int:
        """End of the next request: halfway to the first byte that cannot be read, so that all bytes before it are read.

        Raises:
            Cut: the next byte is the first one that cannot be read.
        """
        if self._at >= self._bad:
            self._bad = NOWHERE
        if stop < self._bad:
            return stop
        if self._bad - self._at <= 1:
            raise Cut(f"{public(self._url)} ends early")
        return self._at + (self._bad - self._at) // 2

    def _fetched(self, start: int, end: int) -> bytes:
        """The bytes from start to end, or only the first part of them if the others cannot be read."""
        while True:
            access = (
                self._access if self._bad == NOWHERE else replace(self._access, retries=min(1, self._access.retries))
            )
            try:
                return patiently(self._url, access, functools.partial(self._request, start, end))
            except Cut as cut:
                if cut.data:
                    return cut.data
                self._bad = end
                if cut.data is not None or end - start <= 1:
                    raise
                end = start + (end - start) // 2

    def _request(self, start: int, end: int) -> bytes:
        deadline = self._access.timeout + (end - start) / SLOWEST
        try:
            data = _called(self._system, deadline, "cat_file", self._path, start=start, end=end)
        except Exception as error:
            if 416 not in {_status(each) for each in _chain(error)}:  # 416: the file ends before this range
                raise
            data = b""
        if len(data) > end - start:  # the server ignores ranges and sent the whole file
            self._pieces = [(0, data)]
            data = data[start:end] if len(data) >= self._size else data[: end - start]
        if len(data) < end - start:
            raise _Short(data)
        return data


# ------------------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Target:
    """A folder behind a URL or on this machine to which results are copied.

    Raises:
        UserError: by every method, if the folder cannot be listed or written.
    """

    url: str
    access: Access
    option: str

    def __str__(self) -> str:
        return public(self.url).rstrip("/")

    def is_empty(self) -> bool:
        return not self._done("listed", "", lambda system, path: self._names(system, path))

    def json(self, name: str) -> Any:
        """Content of a JSON file; None if the file does not exist or is not valid JSON."""

        def read(system: fsspec.AbstractFileSystem, path: str) -> Any:
            with contextlib.suppress(FileNotFoundError, ValueError):
                return json.loads(_called(system, 2 * self.access.timeout, "cat_file", path))

        return self._done("read", name, read)

    def put(self, name: str, file: Path) -> None:
        deadline = 2 * self.access.timeout + file.stat().st_size / SLOWEST

        def write(system: fsspec.AbstractFileSystem, path: str) -> None:
            self._parent(system, path)
            _called(system, deadline, "put_file", str(file), path)

        self._done("written", name, write)

    def put_json(self, name: str, value: Any) -> None:
        data = (json.dumps(value, indent=2) + "\n").encode()

        def write(system: fsspec.AbstractFileSystem, path: str) -> None:
            self._parent(system, path)
            _called(system, 2 * self.access.timeout, "pipe_file", path, data)

        self._done("written", name, write)

    def remove(self, name: str) -> None:
        def remove(system: fsspec.AbstractFileSystem, path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                _called(system, 2 * self.access.timeout, "rm_file", path)

        self._done("written", name, remove)

    def _names(self, system: fsspec.AbstractFileSystem, path: str) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return [name for name in _called(system, None, "ls", path, detail=False) if name.rstrip("/") != path]
        return []

    def _parent(self, system: fsspec.AbstractFileSystem, path: str) -> None:
        protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
        if not protocols & OBJECT_STORES:  # in an object store this would create buckets
            system.makedirs(system._parent(path), exist_ok=True)

    def _done(self, what: str, name: str, work: Callable[[fsspec.AbstractFileSystem, str], Any]) -> Any:
        if self.url.startswith(("http://", "https://")):
            raise UserError(
                f"{self.option}={self}: HTTP servers do not accept folders: give s3://, gs:// or a local folder"
            )
        whole = f"{self.url.rstrip('/')}/{name}" if name else self.url
        system, path = opened_system(whole, self.access)
        try:
            return patiently(whole, self.access, lambda: work(system, path))
        except PermissionError:
            why = f"no permission, or no credentials: {HOW_TO_GIVE}"
        except FileNotFoundError:
            why = "there is no such bucket or folder: create it first"
        except (OSError, Cut) as error:
            why = f"{_first_line(error)}: check the URL and the network"
        raise UserError(f"{self.option}={self} cannot be {what} ({why})")


#: Help text for a server that requires credentials.
HOW_TO_GIVE = (
    "give them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, …), or as storage={key:…,secret:…}"
)
#: File that marks an unfinished copy and stores its identity.
UNDER_WAY = "copying.json"


def copy_folder(source: Path, target: Target, identity: Mapping[str, Any], last: Sequence[str]) -> None:
    """Copy a folder so that a reader never mistakes a partial copy for a complete one.

    The files in `last` are copied last, in their order. An interrupted copy continues, and a copy may be repeated; two
    copies with equal `identity` are the same.

    Raises:
        UserError: the target has files that do not belong to this copy, or it cannot be written.
    """
    refuse_foreign(target, identity, last)
    tally = new_tally()
    target = replace(target, access=replace(target.access, tally=tally))
    try:
        _copy(source, target, identity, last)
    finally:
        line = repeated_since(tally)
        os.unlink(tally)
        if line:
            notice(f"{target.option}: {line}")


def _copy(source: Path, target: Target, identity: Mapping[str, Any], last: Sequence[str]) -> None:
    target.put_json(UNDER_WAY, dict(identity))
    files = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    data = [name for name in files if name not in last]
    copy = lambda name: target.put(name, source / name)  # noqa: E731
    for _ in progress(in_threads(copy, data, AT_ONCE), "copy", total=len(data), unit="file"):
        pass
    for name in last:
        copy(name)
    target.remove(UNDER_WAY)


def refuse_foreign(target: Target, identity: Mapping[str, Any], last: Sequence[str]) -> None:
    """Check that a target is empty or holds a copy with this identity.

    Raises:
        UserError: the target has files that do not belong to a copy with this identity.
    """
    if target.is_empty():
        return
    for name in (UNDER_WAY, *last):
        result = target.json(name)
        if isinstance(result, dict) and all(result.get(key) == value for key, value in identity.items()):
            return
    raise UserError(f"{target.option}={target} is not empty: name another, or remove it")

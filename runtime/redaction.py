"""Keep credentials out of everything that is written or reported: those in URLs, storage options and the environment.

`public` is a pure function, so fingerprints, ids and stored configs use it. `redacted` also knows the secrets that were
given to this process, and is applied last to every message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

#: Replacement of a secret in a message.
HIDDEN = "***"
#: Keys of a config with values that are not stored.
SECRET = re.compile(r"(^|_)(tokens?|passwords?|passwd|secrets?|credentials?|(api|access|private|secret)_?key)$", re.I)
#: Entries of `storage` that hold no secret; all others are not stored.
HARMLESS = frozenset(
    (
        *("account_name", "addressing_style", "anon", "client_kwargs", "config_kwargs", "default_block_size", "host"),
        *("endpoint_url", "fixed_upload_size", "max_concurrency", "port", "project", "region_name", "requester_pays"),
        *("requests_timeout", "s3", "signature_version", "use_ssl", "verify", "version_aware"),
    )
)
#: Keys of a source's config for how its files are reached; they change no result.
ACCESS = ("retries", "timeout", "storage")
#: The entry of a config that holds file-system options.
STORAGE = "storage"

_USER = re.compile(
    r"(?<!github)://[^\s@/:?#]*:(?!\d*(?:[/?#]|$))[^\s@]*@(?:[^\s@/?#]*@)*"  # a password may contain slashes
    r"|(?<=http)://[^\s@/:?#]+@|(?<=https)://[^\s@/:?#]+@|(?<=s3)://[^\s@/:?#]+@|(?<=s3a)://[^\s@/:?#]+@"
)
_WORDS = r"tokens?|secrets?|passwords?|passwd|pwd|credentials?|signature|api[-_]?key|access[-_]?key(?:[-_]?id)?|jwt"
_WORDS += r"|access[-_]?id|account[-_]?key|private[-_]?key|key[-_]?pair[-_]?id|auth|authorization|session"
_VALUE = r"=(?:(?!::|,\w+://)[^&#\s'\"<>])*"
_PARAMETER = re.compile(
    rf"([?&#]|&amp;)(?:x-(?:amz|goog|oss|ms)-[\w.-]+|[\w.-]*(?:{_WORDS})|key|sig|pass){_VALUE}", re.I
)
#: Further parameters of a signed URL, such as expiry and purpose. Without a signature these names may mean anything.
_SIGNED = re.compile(rf"([?&#]|&amp;)(?:expires|policy|s[eprtv]|spr|sip|sdd|ske|sks|skt|sktid|skoid|skv){_VALUE}", re.I)
_IS_SIGNED = re.compile(r"[?&;]((awsaccesskeyid|googleaccessid|signature|sig)=|x-(amz|goog)-)", re.I)
_NAMED = re.compile(
    rf"((?:[\w.-]*(?:{_WORDS}|storage\.key)['\"]?\s*=|['\"](?:\w*(?:{_WORDS})|key)['\"]\s*:)\s*['\"]?)"
    r"(?!null\b|None\b|\*\*\*)([^\s'\",}&)]+)",
    re.I,
)
#: Matches `storage={key:…,secret:…}` on a command line.
_IN_BRACES = re.compile(r"(storage=\{)([^}]*)(\}?)")
_HEADER = re.compile(r"\b((?:Bearer|Basic)\s+)[A-Za-z0-9+/=._~-]{8,}")
#: Fewest characters of a secret to hide; shorter texts also occur in ordinary words.
_SHORTEST = 4
#: Values of gcsfs's token option that are not secrets but name a source of credentials; also other ordinary values.
_ORDINARY = frozenset(("anon", "cloud", "cache", "browser", "google_default", "true", "false", "null", "None"))

_hidden: set[str] = set()


def public(text: str) -> str:
    """A text without the credentials of URLs: no user and password, and no signature, token or key in a query.

    URLs that differ only in their credentials become equal. A text without credentials is returned unchanged.
    """
    if "://" not in text:
        return text
    signed, cleaned = _IS_SIGNED.search(text), _USER.sub("://", text)
    for pattern in (_PARAMETER, _SIGNED) if signed else (_PARAMETER,):
        while (result := pattern.search(cleaned)) is not None:
            before, after = cleaned[: result.start()], cleaned[result.end() :]
            if result[1] in "?#" and after[:1] == "&":
                after = result[1] + after.removeprefix("&amp;").removeprefix("&")
            cleaned = before + after
    return cleaned


def redacted(text: str) -> str:
    """`public`, and additionally without secrets that this process knows or that are named as such (`token=…`)."""
    text = public(text)
    for secret in sorted(_hidden | set(_of_environment()), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _IN_BRACES.sub(lambda result: f"{result[1]}{HIDDEN if result[2] else ''}{result[3]}", text)
    return _HEADER.sub(rf"\1{HIDDEN}", _NAMED.sub(lambda result: result[1] + _mask(result[2]), text))


def _mask(value: str) -> str:
    """Replace a value unless it is a number, as in `max_tokens=77`, which is no secret."""
    return value if value.rstrip(".;:").isdigit() and len(value) < 8 else HIDDEN


def hide(values: Iterable[Any]) -> None:
    """Let `redacted` hide these values from now on."""
    result = {str(value) for value in values if value is not None}
    _hidden.update(value for value in result - _ORDINARY if len(value) >= _SHORTEST)


def secret_values(config: Any, inside: bool = False) -> Iterator[str]:
    """The secret texts in a config (JSON-ready): those with a secret's key, and options of a file system.

    Args:
        inside: whether `config` holds options of a file system, where only the texts of `HARMLESS` keys are not secret.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            if SECRET.search(str(key)) and isinstance(value, str):
                yield value
            elif isinstance(value, (Mapping, list, tuple)):
                yield from secret_values(value, inside or key == STORAGE)
            elif inside and key not in HARMLESS and isinstance(value, str):
                yield value
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from secret_values(value, inside)
            if inside and isinstance(value, str):
                yield value


def harmless_options(options: Any) -> Any:
    """The file-system options that may be stored."""
    if isinstance(options, Mapping):
        return {str(key): harmless_options(value) for key, value in options.items() if key in HARMLESS}
    return public(options) if isinstance(options, str) else options


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= 8 and (SECRET.search(name) or name in ("AWS_ACCESS_KEY_ID", "AZURE_STORAGE_ACCOUNT_KEY")):
            yield value

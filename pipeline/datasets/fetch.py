"""Fetch a file whose MD5 is known from the first of several places that has it, resuming where it was interrupted."""

import fcntl
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests
import urllib3

from pipeline.artifacts import add_path_to_errors, cache_folder, expand, file_md5
from pipeline.core.errors import TemporaryError, UserError, escape_control_chars, redact_url
from pipeline.core.progress import format_bytes, progress
from pipeline.core.project import copy_hint
from pipeline.core.settings import get_settings
from pipeline.params import DownloadParams

CHUNK_BYTES = 1 << 16
MAX_RESUMES = 50
RESUME_PAUSE_SECONDS = 0.5


class _PlaceError(Exception):
    """One place of the archive did not serve; the next is tried."""

    def __init__(self, reason: str, *, may_pass: bool, found_md5: str | None = None) -> None:
        super().__init__(escape_control_chars(reason))  # some of it is the server's own words
        self.may_pass = may_pass
        """Whether the same place may serve at another time: true for the network, false for a missing file."""
        self.found_md5 = found_md5
        """MD5 of the content where the place gave some, but not the right one."""


def find_archive(params: DownloadParams) -> Path:
    """A file on this machine whose MD5 is `params.md5`: kept from an earlier run, local, or fetched just now."""
    for place in params.urls:
        _local_path(place)
    kept = cache_folder("download") / f"{params.md5}.tar.gz"
    with _lock(kept.with_name(f"{params.md5}.lock")):
        if _is_whole(kept, params.md5):
            print(f"{kept}: kept from an earlier download, MD5 as expected")
            return kept
        return _try_places(params, kept=kept)


def _try_places(params: DownloadParams, *, kept: Path) -> Path:
    failures: dict[str, _PlaceError] = {}
    for place in params.urls:
        local = _local_path(place)
        try:
            if local is not None:
                return _check_local(local, params.md5)
            return _fetch(place, params, partial=kept.parent / f"{params.md5}.partial").replace(kept)
        except _PlaceError as failure:
            print(f"{redact_url(place)}: {failure}", flush=True)
            failures[redact_url(place)] = failure
    raise _no_place_served(failures, params.md5)


def _no_place_served(failures: dict[str, _PlaceError], md5: str) -> UserError | TemporaryError:
    places = "; ".join(f"{place}: {failure}" for place, failure in failures.items())
    found = ", ".join(failure.found_md5 for failure in failures.values() if failure.found_md5)
    if found:
        return UserError(
            f"download.md5: found {found}, expected {md5} ({places}); "
            "name a place of the right archive in download.urls, or set download.md5 to the sum you trust"
        )
    remedy = f"download.urls may name a local archive (file:///… or a path) with MD5 {md5}"
    if any(failure.may_pass for failure in failures.values()):
        return TemporaryError(
            f"download.urls: no place could be reached ({places}); try again later, or without network: {remedy}"
        )
    return UserError(f"download.urls: no place has the archive ({places}); {remedy}")


def _local_path(place: str) -> Path | None:
    """The path that a file URL or a plain path names; None for http and https. Raises UserError for anything else."""
    scheme = place.partition("://")[0].lower() if "://" in place else ""
    if scheme in ("http", "https"):
        return None
    if place.lower().startswith("file:"):
        url = urlsplit(place)
        if url.netloc in ("", "localhost"):
            return Path(url2pathname(url.path))
    elif not scheme:
        return expand(place)
    raise UserError(
        f"download.urls: found {redact_url(place)!r}; allowed: http://…, https://…, file:///… or a path; correct it"
    )


def _check_local(path: Path, md5: str) -> Path:
    if not path.is_file():
        reason = "a folder, not an archive" if path.is_dir() else f"no such file{copy_hint(path)}"
        raise _PlaceError(reason, may_pass=False)
    try:
        found = file_md5(path)
    except OSError as error:
        raise _PlaceError(error.strerror or str(error), may_pass=False) from None
    if found != md5:
        raise _PlaceError(f"{format_bytes(path.stat().st_size)} with MD5 {found}", may_pass=False, found_md5=found)
    print(f"{path}: MD5 as expected")
    return path


def _is_whole(path: Path, md5: str) -> bool:
    return path.is_file() and file_md5(path) == md5


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time write a partial download; the lock goes with the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path}: another process fetches the same archive; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(url: str, params: DownloadParams, *, partial: Path) -> Path:
    """Fetch `url` to `partial`, resuming where an earlier attempt, even one with another place, was interrupted.

    What holds the parts together is the MD5 of the whole and not If-Range, because the validators of one mirror mean
    nothing to the next. So a file that was put together and is wrong says nothing about this place, which then gets
    one attempt anew. Raises _PlaceError; a part that may be of use stays.
    """
    if _is_whole(partial, params.md5):
        return partial
    for _ in range(2):
        resumed = _receive_all(url, params, partial=partial)
        found, size = file_md5(partial), partial.stat().st_size
        if found == params.md5:
            return partial
        partial.unlink()
        if not resumed:
            break
        print(f"{redact_url(url)}: the resumed download has MD5 {found}; fetching it anew", flush=True)
    raise _PlaceError(f"{format_bytes(size)} with MD5 {found}", may_pass=False, found_md5=found)


def _receive_all(url: str, params: DownloadParams, *, partial: Path) -> bool:
    """Receive the rest of the file, reconnecting as long as each connection brings it further.

    Returns whether the file is put together from more than one response.
    """
    longest = _size(partial)
    for resumes in range(MAX_RESUMES + 1):
        try:
            return _receive(url, params, partial=partial)
        except _PlaceError as failure:
            size = _size(partial)
            if not failure.may_pass or size <= longest or resumes == MAX_RESUMES:
                raise
            print(f"{redact_url(url)}: {failure}; resuming", flush=True)
            longest = size
        time.sleep(RESUME_PAUSE_SECONDS)
    raise AssertionError("the last attempt returns or raises")


def _receive(url: str, params: DownloadParams, *, partial: Path) -> bool:
    """One request: append to `partial` what it lacks, or write it anew. Returns whether it was appended to."""
    offset = _size(partial)
    # Bytes as they are stored: a .tar.gz that a server declares to be gzip-encoded must not be unpacked in passing.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        with requests.get(
            url, headers=headers, stream=True, timeout=params.timeout_seconds, verify=_certificates()
        ) as response:
            if offset and not _continues(response, offset):
                if response.status_code != 200:
                    partial.unlink()
                    return _receive(url, params, partial=partial)
                offset = 0
            _check_status(response, wanted=206 if offset else 200)
            _append(response, partial, offset=offset)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        may_pass = not isinstance(error, ValueError | requests.TooManyRedirects)
        raise _PlaceError(_reason(error, params.timeout_seconds), may_pass=may_pass) from error
    return offset > 0


def _certificates() -> str | bool:
    """File or folder of the certificates to trust: the user's, else the system's, which a company's inspection needs.

    True, which is the certificates that come with requests, where there are none. The Makefile has the same for pip and
    uv. Raises UserError where a variable names no file or folder.
    """
    for name, value in get_settings().certificates[:1]:
        if Path(value).exists():
            return value
        raise UserError(f"{name}: no such file {value}; allowed: a file or folder of certificates; correct or unset it")
    system = ssl.get_default_verify_paths()
    if system.cafile:
        return system.cafile
    hashed = system.capath and any(Path(system.capath).glob("*.0"))  # as OpenSSL looks them up
    return str(system.capath) if hashed else True


def _continues(response: requests.Response, offset: int) -> bool:
    """Return whether the response resumes at `offset`; an error status, which says nothing of it, counts as yes."""
    if response.status_code == 206:
        return response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
    return response.status_code >= 400 and response.status_code != 416


def _check_status(response: requests.Response, *, wanted: int) -> None:
    status = response.status_code
    if status != wanted:
        raise _PlaceError(
            f"HTTP status {status} {response.reason}", may_pass=status >= 500 or status in (408, 425, 429)
        )


def _append(response: requests.Response, partial: Path, *, offset: int) -> None:
    """Write the body to `partial` from `offset` on. Raises _PlaceError where the body ends too early."""
    length = response.headers.get("Content-Length", "")
    total = offset + int(length) if length.isdecimal() else None
    size = format_bytes(total) if total is not None else "size unknown"
    print(
        f"{redact_url(response.url)}: {f'resuming at {format_bytes(offset)}' if offset else 'fetching'}, {size}",
        flush=True,
    )
    with (
        add_path_to_errors(partial),
        partial.open("ab" if offset else "wb") as file,
        progress("fetching", total=total, done=offset, unit="B") as advance,
    ):
        for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
            file.write(chunk)
            advance(len(chunk))
    if total is not None and _size(partial) < total:
        raise _PlaceError(f"cut off after {format_bytes(_size(partial))} of {format_bytes(total)}", may_pass=True)


def _reason(error: Exception, timeout_seconds: float) -> str:
    """Why a request failed, without the addresses of Python objects and the URL that the libraries put before it."""
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {timeout_seconds:g} s"
    if isinstance(error, requests.ReadTimeout | urllib3.exceptions.ReadTimeoutError):
        return f"nothing arrived for {timeout_seconds:g} s"
    cause = error.args[0] if error.args else error
    cause = getattr(cause, "reason", cause)
    if isinstance(cause, urllib3.exceptions.ProtocolError):
        cause = cause.args[-1]
    text = str(cause).rpartition("): ")[2] if isinstance(cause, urllib3.exceptions.HTTPError) else str(cause)
    return f"TLS: {text}" if isinstance(error, requests.exceptions.SSLError) else text


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

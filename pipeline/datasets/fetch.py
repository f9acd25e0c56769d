"""Download a file whose MD5 is known from the first of several places that has it; an interrupted download resumes."""

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
    """The error for one place that could not provide the archive; the next place is tried.

    `may_pass` is true for a failure that may not occur at another time, as of the network, and false for a missing
    file. `found_md5` is the MD5 of what the place provided, where it is not the right one.
    """

    def __init__(self, reason: str, *, may_pass: bool, found_md5: str | None = None) -> None:
        super().__init__(escape_control_chars(reason))  # the server may have written part of it
        self.may_pass = may_pass
        self.found_md5 = found_md5


def find_archive(params: DownloadParams) -> Path:
    """Return a local file with the MD5 `params.md5`: from the cache, from a path in `params.urls`, or downloaded.

    Raises UserError for a place of an unknown kind, and where no place has the file; TemporaryError where one may have
    it at another time.
    """
    for place in params.urls:  # all are checked before anything is downloaded
        _local_path(place)
    cached = cache_folder("download") / f"{params.md5}.tar.gz"
    with _lock(cached.with_name(f"{params.md5}.lock")):
        if _has_md5(cached, params.md5):
            print(f"{cached}: cached by an earlier download, MD5 as expected")
            return cached
        return _try_places(params, cached=cached)


def _try_places(params: DownloadParams, *, cached: Path) -> Path:
    """Return the file from the first place that provides it; a download is moved to `cached`."""
    failures: dict[str, _PlaceError] = {}
    for place in params.urls:
        local = _local_path(place)
        try:
            if local is not None:
                return _check_local(local, params.md5)
            return _fetch(place, params, partial=cached.parent / f"{params.md5}.partial").replace(cached)
        except _PlaceError as failure:
            print(f"{redact_url(place)}: {failure}", flush=True)
            failures[redact_url(place)] = failure
    raise _all_failed(failures, params.md5)


def _all_failed(failures: dict[str, _PlaceError], md5: str) -> UserError | TemporaryError:
    """Return the error for an archive that none of the places could provide."""
    places = "; ".join(f"{place}: {failure}" for place, failure in failures.items())
    found = ", ".join(failure.found_md5 for failure in failures.values() if failure.found_md5)
    if found:
        return UserError(
            f"download.md5: found {found}, expected {md5} ({places}); "
            "set download.urls to a place of the right archive, or download.md5 to the MD5 that you trust"
        )
    remedy = f"download.urls may name a local archive (file:///… or a path) with MD5 {md5}"
    if any(failure.may_pass for failure in failures.values()):
        return TemporaryError(
            f"download.urls: no place could be reached ({places}); try again later, or without network: {remedy}"
        )
    return UserError(f"download.urls: no place has the archive ({places}); {remedy}")


def _local_path(place: str) -> Path | None:
    """Return the path in a file URL or plain path, or None for an http or https URL; raises UserError for others."""
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
    """Return the path of a local archive; raises _PlaceError where there is no file with this MD5."""
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


def _has_md5(path: Path, md5: str) -> bool:
    return path.is_file() and file_md5(path) == md5


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time write a partial download; the lock is released when the process ends, however."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path}: another process fetches the same archive; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(url: str, params: DownloadParams, *, partial: Path) -> Path:
    """Download `url` to `partial`, resuming an earlier attempt even if that was with another place.

    Only the MD5 of the complete file shows whether its parts belong together: the HTTP header If-Range does not help,
    as one mirror does not know the validators of another. A file that consists of several parts and has a wrong MD5 is
    therefore no proof against this place, which gets one more attempt from the beginning. Raises _PlaceError; a part
    that may still be useful stays.
    """
    if _has_md5(partial, params.md5):
        return partial
    for _ in range(2):
        resumed = _receive_all(url, params, partial=partial)
        found, size = file_md5(partial), partial.stat().st_size
        if found == params.md5:
            return partial
        partial.unlink()
        if not resumed:
            break
        print(f"{redact_url(url)}: the resumed download has MD5 {found}; downloading all of it again", flush=True)
    raise _PlaceError(f"{format_bytes(size)} with MD5 {found}", may_pass=False, found_md5=found)


def _receive_all(url: str, params: DownloadParams, *, partial: Path) -> bool:
    """Receive the rest of the file; reconnect as long as each connection adds to it.

    Returns whether the file consists of parts from more than one response.
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
    """Send one request, and append the rest of the file to `partial`, or write `partial` from the beginning.

    Returns whether it was appended. Raises _PlaceError.
    """
    offset = _size(partial)
    # identity: a .tar.gz that a server declares as gzip-encoded must not be decompressed by the client
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
    """Return the file or folder of certificates to trust: the user's, else the system's.

    The system's may include that of a company that inspects TLS. Where there are none, the result is True: the
    certificates that come with `requests`. The Makefile chooses in the same way for pip and uv. Raises UserError where
    an environment variable names no file or folder.
    """
    for name, value in get_settings().certificates[:1]:
        if Path(value).exists():
            return value
        raise UserError(f"{name}: no such file {value}; allowed: a file or folder of certificates; correct or unset it")
    system = ssl.get_default_verify_paths()
    if system.cafile:
        return system.cafile
    has_certificates = system.capath and any(Path(system.capath).glob("*.0"))  # OpenSSL finds them by these names
    return str(system.capath) if has_certificates else True


def _continues(response: requests.Response, offset: int) -> bool:
    """Return whether the response begins at `offset`; for an error status the answer is yes, as it has no content."""
    if response.status_code == 206:
        return response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
    return response.status_code >= 400 and response.status_code != 416


def _check_status(response: requests.Response, *, wanted: int) -> None:
    """Raise _PlaceError where the response has another HTTP status than `wanted`."""
    status = response.status_code
    if status != wanted:
        raise _PlaceError(
            f"HTTP status {status} {response.reason}", may_pass=status >= 500 or status in (408, 425, 429)
        )


def _append(response: requests.Response, partial: Path, *, offset: int) -> None:
    """Write the body of the response to `partial` from `offset` on; raises _PlaceError where the body is incomplete."""
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
    """Return why a request failed; the libraries' own texts begin with URLs and addresses of Python objects."""
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

"""The step download gets the CIFAR-10 archive or the digits, checks them, and refuses bad input in one line."""

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pipeline.core.errors import EXIT_TEMPORARY, EXIT_USER, TemporaryError, UserError
from pipeline.datasets import cifar10 as cifar10_source
from pipeline.download import download
from pipeline.params import load_params
from tests.archive_server import Handler, Site
from tests.conftest import PROJECT
from tests.download import (
    ARCHIVE,
    CONTENT,
    OUT,
    cifar10,
    download_params,
    listing,
    make_archive,
    md5,
    project,  # noqa: F401  # a fixture that each test uses
    run_main,
)


@pytest.fixture
def serve() -> Iterator[Callable[..., Site]]:
    servers = []

    def start(content: bytes, **options: object) -> Site:
        site = Site(content, **options)  # type: ignore[arg-type]
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, site))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        site.url = f"http://127.0.0.1:{server.server_address[1]}/data/cifar.tar.gz"
        servers.append(server)
        return site

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


Serve = Callable[..., Site]


def partial(content: bytes = CONTENT) -> Path:
    return Path(".cache/download") / f"{md5(content)}.partial"


def write_partial(content: bytes) -> None:
    partial().parent.mkdir(parents=True, exist_ok=True)
    partial().write_bytes(content)


def unreachable_url() -> str:
    """Return a URL on loopback where nothing listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_address[1]
    return f"http://127.0.0.1:{port}/cifar.tar.gz"


# ---- cifar10: over the network


def test_the_archive_is_fetched_checked_and_recorded(serve: Serve) -> None:
    download(cifar10(serve(CONTENT).url))
    assert ARCHIVE.read_bytes() == CONTENT
    assert json.loads((OUT / "source.json").read_text()) == {"dataset": "cifar10"}
    assert listing() == ["checksums.md5", "cifar-10-python.tar.gz", "source.json"]


def test_an_interrupted_download_resumes_where_it_stopped(serve: Serve) -> None:
    site = serve(CONTENT)
    write_partial(CONTENT[:70_000])
    download(cifar10(site.url))
    assert site.requested_ranges == ["bytes=70000-"]
    assert ARCHIVE.read_bytes() == CONTENT


def test_a_server_without_ranges_sends_the_whole_archive_again(serve: Serve) -> None:
    site = serve(CONTENT, ranges=False)
    write_partial(CONTENT[:70_000])
    download(cifar10(site.url))
    assert site.requested_ranges == ["bytes=70000-"]
    assert ARCHIVE.read_bytes() == CONTENT


@pytest.mark.parametrize("chunked", [False, True])
def test_a_download_that_is_interrupted_twice_is_completed(serve: Serve, chunked: bool) -> None:
    site = serve(CONTENT, cut_after_bytes=[60_000, 30_000], chunked=chunked)
    download(cifar10(site.url))
    assert site.requested_ranges == [None, "bytes=60000-", "bytes=90000-"]
    assert ARCHIVE.read_bytes() == CONTENT


def test_without_ranges_the_download_is_retried_as_long_as_more_arrives(serve: Serve) -> None:
    site = serve(CONTENT, ranges=False, cut_after_bytes=[60_000, 90_000])
    download(cifar10(site.url))
    assert len(site.requested_ranges) == 3
    assert ARCHIVE.read_bytes() == CONTENT


def test_the_next_mirror_resumes_where_the_first_one_stopped(serve: Serve) -> None:
    first, second = serve(CONTENT, cut_after_bytes=[60_000, 0]), serve(CONTENT)
    download(cifar10(first.url, second.url))
    assert first.requested_ranges == [None, "bytes=60000-"]
    assert second.requested_ranges == ["bytes=60000-"]
    assert ARCHIVE.read_bytes() == CONTENT


def test_the_partial_file_of_a_broken_download_is_kept_for_the_next_run(serve: Serve) -> None:
    site = serve(CONTENT, cut_after_bytes=[60_000, 0])
    with pytest.raises(TemporaryError, match="broken"):
        download(cifar10(site.url))
    assert partial().read_bytes() == CONTENT[:60_000]
    assert not ARCHIVE.exists()


def test_a_server_that_stops_sending_is_given_up_after_the_timeout(serve: Serve) -> None:
    silence = threading.Event()
    site = serve(CONTENT, cut_after_bytes=[60_000, 0], silence=silence)
    with pytest.raises(TemporaryError, match=r"nothing arrived for 0\.2 s"):
        download(cifar10(site.url, timeout_seconds=0.2))
    silence.set()
    assert partial().stat().st_size <= 60_000


def test_a_partial_file_of_full_length_with_wrong_content_is_fetched_again(serve: Serve) -> None:
    site = serve(CONTENT)
    write_partial(bytes(len(CONTENT)))
    download(cifar10(site.url))
    assert site.requested_ranges == [f"bytes={len(CONTENT)}-", None]
    assert ARCHIVE.read_bytes() == CONTENT


def test_a_complete_partial_file_needs_no_network() -> None:
    write_partial(CONTENT)
    download(cifar10(unreachable_url()))
    assert ARCHIVE.read_bytes() == CONTENT


def test_a_damaged_partial_file_is_fetched_again_from_the_same_server(serve: Serve) -> None:
    site = serve(CONTENT)
    write_partial(bytes(70_000))
    download(cifar10(site.url))
    assert site.requested_ranges == ["bytes=70000-", None]
    assert ARCHIVE.read_bytes() == CONTENT


def test_a_range_that_was_not_requested_is_not_used(serve: Serve) -> None:
    site = serve(CONTENT, range_offset_bytes=10)
    write_partial(CONTENT[:70_000])
    download(cifar10(site.url))
    assert site.requested_ranges == ["bytes=70000-", None]
    assert ARCHIVE.read_bytes() == CONTENT


def test_the_partial_file_is_kept_for_the_next_mirror_after_an_error_status(serve: Serve) -> None:
    first, second = serve(CONTENT, status=503), serve(CONTENT)
    write_partial(CONTENT[:70_000])
    download(cifar10(first.url, second.url))
    assert second.requested_ranges == ["bytes=70000-"]


@pytest.mark.parametrize("options", [{"headers": {"Content-Encoding": "gzip"}}, {"chunked": True}])
def test_the_archive_is_not_decoded_whatever_the_server_declares(serve: Serve, options: dict[str, object]) -> None:
    site = serve(CONTENT, **options)
    download(cifar10(site.url))
    assert site.accepted_encodings == ["identity"]
    assert ARCHIVE.read_bytes() == CONTENT


def test_a_redirected_request_keeps_its_range(serve: Serve) -> None:
    site = serve(CONTENT)
    write_partial(CONTENT[:70_000])
    download(cifar10(site.url.replace("/data/cifar.tar.gz", "/moved")))
    assert site.requested_ranges == ["bytes=70000-", "bytes=70000-"]
    assert ARCHIVE.read_bytes() == CONTENT


def test_a_mirror_with_wrong_content_is_reported_and_the_next_one_used(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, right = serve(b"<html>not here</html>"), serve(CONTENT)
    download(cifar10(wrong.url, right.url))
    assert f"{wrong.url}: 21 bytes with MD5 {md5(wrong.content)}" in capsys.readouterr().out
    assert wrong.requested_ranges == [None]
    assert ARCHIVE.read_bytes() == CONTENT


def test_wrong_content_from_all_mirrors_is_a_user_error(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    site = serve(b"other")
    status, stderr = run_main(capfd, dataset="cifar10", urls=[site.url, unreachable_url()], md5=md5(CONTENT))
    assert status == EXIT_USER
    assert stderr.startswith(f"error: download.md5: found {md5(b'other')}, expected {md5(CONTENT)}")
    assert stderr.count("\n") == 1
    assert site.url in stderr
    assert not partial().exists()
    assert not ARCHIVE.exists()


def test_no_network_is_a_temporary_failure_whose_message_names_each_location_and_the_remedy(
    capfd: pytest.CaptureFixture[str],
) -> None:
    locations = [unreachable_url(), "https://127.0.0.1:9/a.tar.gz", "missing/a.tar.gz"]
    status, stderr = run_main(capfd, dataset="cifar10", urls=locations)
    assert status == EXIT_TEMPORARY
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert all(location in stderr for location in locations)
    assert "no such file" in stderr
    assert "Connection refused" in stderr
    assert "file:///" in stderr
    assert load_params().download.md5 in stderr


def test_a_server_without_tls_is_a_temporary_failure(serve: Serve) -> None:
    site = serve(CONTENT)
    with pytest.raises(TemporaryError, match="TLS: "):
        download(cifar10(site.url.replace("http://", "https://")))


def test_a_page_that_does_not_exist_is_a_user_error(serve: Serve) -> None:
    with pytest.raises(UserError, match="HTTP status 404"):
        download(cifar10(serve(b"", status=404).url))


def test_secrets_in_a_url_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    address = unreachable_url() + "?token=secret"
    with pytest.raises(TemporaryError) as failure:
        download(cifar10(address))
    assert "secret" not in str(failure.value) + capsys.readouterr().out


def test_a_full_disk_is_reported_with_the_file(serve: Serve) -> None:
    # a limit on the size of files fails in the same way as a full disk or a quota
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="partial"):
            download(cifar10(serve(CONTENT).url))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_second_run_needs_no_network_although_its_output_was_deleted(serve: Serve) -> None:
    site = serve(CONTENT)
    download(cifar10(site.url))
    shutil.rmtree(OUT)
    download(cifar10(site.url))
    assert len(site.requested_ranges) == 1
    assert ARCHIVE.read_bytes() == CONTENT


def test_the_cache_folder_can_be_elsewhere(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_CACHE_DIR", str(tmp_path / "shared"))
    download(cifar10(serve(CONTENT).url))
    assert (tmp_path / "shared/download" / f"{md5(CONTENT)}.tar.gz").read_bytes() == CONTENT
    assert not Path(".cache").exists()


def test_two_processes_at_the_same_time_fetch_the_archive_once(serve: Serve) -> None:
    site = serve(CONTENT, delay_seconds=1.5)
    code = "import sys; from pipeline.download import *; "
    code += "download(DownloadParams.model_validate_json(sys.argv[1]), folder=Path(sys.argv[2]))"
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    arguments = [sys.executable, "-c", code, cifar10(site.url).model_dump_json()]
    runs = [subprocess.Popen([*arguments, f"out{n}"], env=environment) for n in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(site.requested_ranges) == 1
    assert Path("out0/cifar-10-python.tar.gz").read_bytes() == Path("out1/cifar-10-python.tar.gz").read_bytes()


def test_the_default_is_torchvisions_archive() -> None:
    from torchvision.datasets import CIFAR10  # noqa: PLC0415  # takes seconds, and one test needs it

    params = load_params(PROJECT / "params.yaml").download
    assert CIFAR10.url in params.urls
    assert params.md5 == CIFAR10.tgz_md5
    assert CIFAR10.filename == cifar10_source.ARCHIVE


# ---- cifar10: from a local archive


@pytest.mark.parametrize("write", [lambda path: path.as_uri(), str, os.path.relpath])
def test_a_local_archive_is_accepted(tmp_path: Path, write: Callable[[Path], str]) -> None:
    path = tmp_path / "my data é" / "cifar #1.tar.gz"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    download(cifar10("missing.tar.gz", write(path)))
    assert ARCHIVE.read_bytes() == CONTENT
    assert path.read_bytes() == CONTENT


def test_a_truncated_local_archive_is_refused_and_the_previous_output_stays(capfd: pytest.CaptureFixture[str]) -> None:
    Path("whole.tar.gz").write_bytes(CONTENT)
    Path("cut.tar.gz").write_bytes(CONTENT[:-1000])
    download(cifar10("whole.tar.gz"))
    status, stderr = run_main(capfd, dataset="cifar10", urls=["cut.tar.gz"], md5=md5(CONTENT))
    assert status == EXIT_USER
    assert "cut.tar.gz" in stderr
    assert md5(CONTENT[:-1000]) in stderr
    assert stderr.count("\n") == 1
    assert ARCHIVE.read_bytes() == CONTENT


@pytest.mark.parametrize("location", ["gone.tar.gz", "."])
def test_a_missing_local_archive_is_a_user_error(location: str) -> None:
    with pytest.raises(UserError, match=r"no such file|a folder, not an archive"):
        download(cifar10(location))


@pytest.mark.parametrize("location", ["ftp://host/a.tar.gz", "s3://bucket/a.tar.gz", "file://host/a.tar.gz"])
def test_an_unknown_url_scheme_is_refused_before_anything_is_fetched(serve: Serve, location: str) -> None:
    site = serve(CONTENT)
    with pytest.raises(UserError, match="allowed: http://"):
        download(cifar10(site.url, location))
    assert site.requested_ranges == []


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (member("../outside"), "outside"),
        (member("cifar-10-batches-py/../../outside"), "outside"),
        (member("/etc/outside"), "absolute"),
        (member("cifar-10-batches-py/link", tarfile.SYMTYPE, "/etc/passwd"), "link"),
        (member("cifar-10-batches-py/hard", tarfile.LNKTYPE, "../outside"), "link"),
        (member("cifar-10-batches-py/pipe", tarfile.FIFOTYPE), "device"),
        (member("cifar-10-batches-py/disk", tarfile.BLKTYPE), "device"),
    ],
)
def test_an_archive_with_a_member_that_leaves_its_folder_is_refused(bad: tarfile.TarInfo, problem: str) -> None:
    content = make_archive(bad, size=10)
    Path("bad.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=problem) as error:
        download(cifar10("bad.tar.gz", content=content))
    assert repr(bad.name) in str(error.value)
    assert "bad.tar.gz" in str(error.value)
    assert not ARCHIVE.exists()


@pytest.mark.parametrize("content", [b"no archive", b"", CONTENT[:-1000], b"\x1f\x8b" + bytes(100)])
def test_an_incomplete_archive_is_refused_even_with_the_right_checksum(content: bytes) -> None:
    Path("bad.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match="not a complete tar archive"):
        download(cifar10("bad.tar.gz", content=content))


# ---- digits


def test_digits_equal_those_of_scikit_learn() -> None:
    download(download_params(dataset="digits"))
    images, labels = np.load(OUT / "images.npy"), np.load(OUT / "labels.npy")
    assert (images.dtype, images.shape, images.min(), images.max()) == (np.uint8, (1797, 8, 8), 0, 16)
    assert (labels.dtype, labels.shape, labels[:10].tolist()) == (np.int64, (1797,), list(range(10)))
    original = load_digits()
    assert (images == original.images).all()
    assert (labels == original.target).all()
    assert json.loads((OUT / "source.json").read_text()) == {"dataset": "digits"}


def test_another_data_set_replaces_the_output() -> None:
    Path("whole.tar.gz").write_bytes(CONTENT)
    download(cifar10("whole.tar.gz"))
    (OUT / ".images.tar.1.tmp").touch()
    download(cifar10("whole.tar.gz").model_copy(update={"dataset": "digits"}))
    assert listing() == ["checksums.md5", "images.npy", "labels.npy", "source.json"]

"""The download step: three sources, each whole and checked or refused in one line."""

import functools
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipeline import download as step
from pipeline.core.errors import EXIT_TEMPORARY, EXIT_USER, TemporaryError, UserError
from pipeline.core.yaml import dump_yaml, read_yaml
from pipeline.datasets import cifar10 as cifar10_source
from pipeline.datasets import fetch
from pipeline.download import download
from pipeline.params import DownloadParams, load_params
from tests import conftest

PROJECT = Path(__file__).parents[1]
OUT = Path("artifacts/download")
ARCHIVE = OUT / "cifar-10-python.tar.gz"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder with the default parameters, the working folder of each test."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(PROJECT / "params.yaml", folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PIPELINE_CACHE_DIR", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch, "RESUME_PAUSE_SECONDS", 0.0)
    return folder


# ---- a server on loopback


@dataclass
class Site:
    """What the server answers with, and what it was asked for."""

    content: bytes
    ranges: bool = True
    status: int | None = None
    cuts: list[int] = field(default_factory=list)
    """Bytes of the body after which the connection is closed, for the first requests in turn."""
    headers: dict[str, str] = field(default_factory=dict)
    chunked: bool = False
    shift: int = 0
    """A server that answers a range with another range than was asked for."""
    silence: threading.Event | None = None
    """Where a body is cut, the connection stays open until it is set."""
    delay_seconds: float = 0.0
    asked: list[str | None] = field(default_factory=list)
    accepted: list[str | None] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, site: Site, *arguments: object) -> None:
        self.site = site
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        site, wanted = self.site, self.headers.get("Range")
        site.asked.append(wanted)
        site.accepted.append(self.headers.get("Accept-Encoding"))
        if self.path == "/moved":
            self._start(302, {"Location": site.url, "Content-Length": "0"})
        elif site.status:
            self._start(site.status, {"Content-Length": "0"})
        elif wanted and site.ranges:
            self._send_range(int(wanted.removeprefix("bytes=").removesuffix("-")) + site.shift)
        else:
            self._send(200, site.content, {})

    def _send_range(self, start: int) -> None:
        total = len(self.site.content)
        if start >= total:
            self._start(416, {"Content-Range": f"bytes */{total}", "Content-Length": "0"})
        else:
            self._send(206, self.site.content[start:], {"Content-Range": f"bytes {start}-{total - 1}/{total}"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        time.sleep(self.site.delay_seconds)
        cut = self.site.cuts.pop(0) if self.site.cuts else len(body)
        framing = {"Transfer-Encoding": "chunked"} if self.site.chunked else {"Content-Length": str(len(body))}
        self._start(status, headers | framing | self.site.headers)
        sent = body[:cut]
        self.wfile.write(in_chunks(sent, ended=cut == len(body)) if self.site.chunked else sent)
        if cut < len(body):
            self.wfile.flush()
            if self.site.silence:
                self.site.silence.wait()
        self.close_connection = True

    def _start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def in_chunks(body: bytes, *, ended: bool) -> bytes:
    """The body in HTTP's chunked transfer coding, with the end mark or broken off before it."""
    pieces = (body[start : start + 10_000] for start in range(0, len(body), 10_000))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + (b"0\r\n\r\n" if ended else b"")


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


def make_archive(*members: tarfile.TarInfo, size: int = 200_000) -> bytes:
    """A .tar.gz with one incompressible file of `size` bytes and further, empty members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        data = np.random.default_rng(0).bytes(size)
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
        for member in members:
            archive.addfile(member)
    return buffer.getvalue()


CONTENT = make_archive()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def download_params(**changes: object) -> DownloadParams:
    return conftest.params(**{f"download__{name}": value for name, value in changes.items()}).download


def cifar10(*urls: str, content: bytes = CONTENT, timeout_seconds: float = 300.0) -> DownloadParams:
    return download_params(dataset="cifar10", urls=urls, md5=md5(content), timeout_seconds=timeout_seconds)


def listing() -> list[str]:
    return sorted(path.name for path in OUT.iterdir())


def partial(content: bytes = CONTENT) -> Path:
    return Path(".cache/download") / f"{md5(content)}.partial"


def keep_partial(part: bytes) -> None:
    partial().parent.mkdir(parents=True, exist_ok=True)
    partial().write_bytes(part)


def nowhere() -> str:
    """An address on loopback where nothing listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_address[1]
    return f"http://127.0.0.1:{port}/cifar.tar.gz"


def run_main(capfd: pytest.CaptureFixture[str], **changes: object) -> tuple[int, str]:
    """Exit status and stderr of the step run on `params.yaml` with some fields of its section changed."""
    values = read_yaml(Path("params.yaml"))
    values["download"].update(changes)
    Path("params.yaml").write_text(dump_yaml(values), encoding="utf-8")
    with pytest.raises(SystemExit) as leaving:
        step.main()
    return int(leaving.value.code or 0), capfd.readouterr().err


# ---- cifar10: over the network


def test_fetches_checks_and_records_the_archive(serve: Serve) -> None:
    download(cifar10(serve(CONTENT).url))
    assert ARCHIVE.read_bytes() == CONTENT
    assert json.loads((OUT / "source.json").read_text()) == {"dataset": "cifar10"}
    assert listing() == ["checksums.md5", "cifar-10-python.tar.gz", "source.json"]


def test_an_interrupted_download_resumes_where_it_stopped(serve: Serve) -> None:
    site = serve(CONTENT)
    keep_partial(CONTENT[:70_000])
    download(cifar10(site.url))
    assert site.asked == ["bytes=70000-"]
    assert ARCHIVE.read_bytes() == CONTENT


def test_a_server_without_ranges_sends_it_all_again(serve: Serve) -> None:
    site = serve(CONTENT, ranges=False)
    keep_partial(CONTENT[:70_000])
    download(cifar10(site.url))
    assert site.asked == ["bytes=70000-"]
    assert ARCHIVE.read_bytes() == CONTENT


@pytest.mark.parametrize("chunked", [False, True])
def test_a_download_cut_off_twice_comes_whole(serve: Serve, chunked: bool) -> None:
    site = serve(CONTENT, cuts=[60_000, 30_000], chunked=chunked)
    download(cifar10(site.url))
    assert site.asked == [None, "bytes=60000-", "bytes=90000-"]
    assert ARCHIVE.read_bytes() == CONTENT


def test_without_ranges_it_is_tried_again_as_long_as_more_arrives(serve: Serve) -> None:
    site = serve(CONTENT, ranges=False, cuts=[60_000, 90_000])
    download(cifar10(site.url))
    assert len(site.asked) == 3
    assert ARCHIVE.read_bytes() == CONTENT


def test_the_next_mirror_goes_on_where_the_first_one_broke_off(serve: Serve) -> None:
    first, second = serve(CONTENT, cuts=[60_000, 0]), serve(CONTENT)
    download(cifar10(first.url, second.url))
    assert first.asked == [None, "bytes=60000-"]
    assert second.asked == ["bytes=60000-"]
    assert ARCHIVE.read_bytes() == CONTENT


def test_a_place_that_breaks_off_keeps_its_part_for_the_next_run(serve: Serve) -> None:
    site = serve(CONTENT, cuts=[60_000, 0])
    with pytest.raises(TemporaryError, match="broken"):
        download(cifar10(site.url))
    assert partial().read_bytes() == CONTENT[:60_000]
    assert not ARCHIVE.exists()


def test_a_place_that_falls_silent_is_given_up_after_the_timeout(serve: Serve) -> None:
    silence = threading.Event()
    site = serve(CONTENT, cuts=[60_000, 0], silence=silence)
    with pytest.raises(TemporaryError, match=r"nothing arrived for 0\.2 s"):
        download(cifar10(site.url, timeout_seconds=0.2))
    silence.set()
    assert partial().stat().st_size <= 60_000


def test_a_part_as_long_as_the_whole_but_wrong_is_fetched_anew(serve: Serve) -> None:
    site = serve(CONTENT)
    keep_partial(bytes(len(CONTENT)))
    download(cifar10(site.url))
    assert site.asked == [f"bytes={len(CONTENT)}-", None]
    assert ARCHIVE.read_bytes() == CONTENT


def test_a_part_that_is_whole_needs_no_network() -> None:
    keep_partial(CONTENT)
    download(cifar10(nowhere()))
    assert ARCHIVE.read_bytes() == CONTENT


def test_a_damaged_part_is_noticed_and_fetched_anew_from_the_same_place(serve: Serve) -> None:
    site = serve(CONTENT)
    keep_partial(bytes(70_000))
    download(cifar10(site.url))
    assert site.asked == ["bytes=70000-", None]
    assert ARCHIVE.read_bytes() == CONTENT


def test_another_range_than_asked_for_is_not_taken(serve: Serve) -> None:
    site = serve(CONTENT, shift=10)
    keep_partial(CONTENT[:70_000])
    download(cifar10(site.url))
    assert site.asked == ["bytes=70000-", None]
    assert ARCHIVE.read_bytes() == CONTENT


def test_an_error_status_keeps_the_part_for_the_next_mirror(serve: Serve) -> None:
    first, second = serve(CONTENT, status=503), serve(CONTENT)
    keep_partial(CONTENT[:70_000])
    download(cifar10(first.url, second.url))
    assert second.asked == ["bytes=70000-"]


@pytest.mark.parametrize("options", [{"headers": {"Content-Encoding": "gzip"}}, {"chunked": True}])
def test_bytes_are_taken_as_stored(serve: Serve, options: dict[str, object]) -> None:
    site = serve(CONTENT, **options)
    download(cifar10(site.url))
    assert site.accepted == ["identity"]
    assert ARCHIVE.read_bytes() == CONTENT


def test_redirects_are_followed_with_the_range(serve: Serve) -> None:
    site = serve(CONTENT)
    keep_partial(CONTENT[:70_000])
    download(cifar10(site.url.replace("/data/cifar.tar.gz", "/moved")))
    assert site.asked == ["bytes=70000-", "bytes=70000-"]
    assert ARCHIVE.read_bytes() == CONTENT


def test_a_mirror_with_other_content_is_named_and_the_next_one_used(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, right = serve(b"<html>not here</html>"), serve(CONTENT)
    download(cifar10(wrong.url, right.url))
    assert f"{wrong.url}: 21 bytes with MD5 {md5(wrong.content)}" in capsys.readouterr().out
    assert wrong.asked == [None]
    assert ARCHIVE.read_bytes() == CONTENT


def test_wrong_content_everywhere_is_the_users_to_fix(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    site = serve(b"other")
    status, told = run_main(capfd, dataset="cifar10", urls=[site.url, nowhere()], md5=md5(CONTENT))
    assert status == EXIT_USER
    assert told.startswith(f"error: download.md5: found {md5(b'other')}, expected {md5(CONTENT)}")
    assert told.count("\n") == 1
    assert site.url in told
    assert not partial().exists()
    assert not ARCHIVE.exists()


def test_no_network_is_a_temporary_failure_that_names_each_place_and_the_way_without(
    capfd: pytest.CaptureFixture[str],
) -> None:
    places = [nowhere(), "https://127.0.0.1:9/a.tar.gz", "missing/a.tar.gz"]
    status, told = run_main(capfd, dataset="cifar10", urls=places)
    assert status == EXIT_TEMPORARY
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert all(place in told for place in places)
    assert "no such file" in told
    assert "Connection refused" in told
    assert "file:///" in told
    assert load_params().download.md5 in told


def test_tls_where_none_is_spoken_is_a_temporary_failure(serve: Serve) -> None:
    site = serve(CONTENT)
    with pytest.raises(TemporaryError, match="TLS: "):
        download(cifar10(site.url.replace("http://", "https://")))


def test_a_page_that_does_not_exist_is_no_temporary_failure(serve: Serve) -> None:
    with pytest.raises(UserError, match="HTTP status 404"):
        download(cifar10(serve(b"", status=404).url))


def test_secrets_in_an_address_are_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    address = nowhere() + "?token=secret"
    with pytest.raises(TemporaryError) as failure:
        download(cifar10(address))
    assert "secret" not in str(failure.value) + capsys.readouterr().out


def test_a_full_disk_is_told_with_the_file(serve: Serve) -> None:
    # Limits the size of any file this process writes: what happens is what a full disk or a quota does.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="partial"):
            download(cifar10(serve(CONTENT).url))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_second_run_needs_no_network_although_the_folder_was_emptied(serve: Serve) -> None:
    site = serve(CONTENT)
    download(cifar10(site.url))
    shutil.rmtree(OUT)
    download(cifar10(site.url))
    assert len(site.asked) == 1
    assert ARCHIVE.read_bytes() == CONTENT


def test_the_cache_folder_can_be_elsewhere(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_CACHE_DIR", str(tmp_path / "shared"))
    download(cifar10(serve(CONTENT).url))
    assert (tmp_path / "shared/download" / f"{md5(CONTENT)}.tar.gz").read_bytes() == CONTENT
    assert not Path(".cache").exists()


def test_processes_at_the_same_time_fetch_once(serve: Serve) -> None:
    site = serve(CONTENT, delay_seconds=1.5)
    code = "import sys; from pipeline.download import *; "
    code += "download(DownloadParams.model_validate_json(sys.argv[1]), folder=Path(sys.argv[2]))"
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    arguments = [sys.executable, "-c", code, cifar10(site.url).model_dump_json()]
    runs = [subprocess.Popen([*arguments, f"out{n}"], env=environment) for n in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(site.asked) == 1
    assert Path("out0/cifar-10-python.tar.gz").read_bytes() == Path("out1/cifar-10-python.tar.gz").read_bytes()


def test_the_default_is_torchvisions_archive() -> None:
    from torchvision.datasets import CIFAR10  # noqa: PLC0415  # takes seconds, and one test needs it

    params = load_params(PROJECT / "params.yaml").download
    assert CIFAR10.url in params.urls
    assert params.md5 == CIFAR10.tgz_md5
    assert CIFAR10.filename == cifar10_source.ARCHIVE


# ---- cifar10: from a local archive


@pytest.mark.parametrize("write", [lambda path: path.as_uri(), str, os.path.relpath])
def test_takes_a_local_archive(tmp_path: Path, write: Callable[[Path], str]) -> None:
    path = tmp_path / "my data é" / "cifar #1.tar.gz"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    download(cifar10("missing.tar.gz", write(path)))
    assert ARCHIVE.read_bytes() == CONTENT
    assert path.read_bytes() == CONTENT


def test_a_truncated_local_archive_is_refused_and_what_was_there_stays(capfd: pytest.CaptureFixture[str]) -> None:
    Path("whole.tar.gz").write_bytes(CONTENT)
    Path("cut.tar.gz").write_bytes(CONTENT[:-1000])
    download(cifar10("whole.tar.gz"))
    status, told = run_main(capfd, dataset="cifar10", urls=["cut.tar.gz"], md5=md5(CONTENT))
    assert status == EXIT_USER
    assert "cut.tar.gz" in told
    assert md5(CONTENT[:-1000]) in told
    assert told.count("\n") == 1
    assert ARCHIVE.read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["gone.tar.gz", "."])
def test_no_local_archive_is_the_users_to_fix(place: str) -> None:
    with pytest.raises(UserError, match=r"no such file|a folder, not an archive"):
        download(cifar10(place))


@pytest.mark.parametrize("place", ["ftp://host/a.tar.gz", "s3://bucket/a.tar.gz", "file://host/a.tar.gz"])
def test_a_place_of_unknown_kind_is_refused_before_anything_is_fetched(serve: Serve, place: str) -> None:
    site = serve(CONTENT)
    with pytest.raises(UserError, match="allowed: http://"):
        download(cifar10(site.url, place))
    assert site.asked == []


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
def test_what_is_no_whole_archive_is_refused_even_with_the_right_sum(content: bytes) -> None:
    Path("bad.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match="not a complete tar archive"):
        download(cifar10("bad.tar.gz", content=content))


# ---- digits


def test_digits_are_scikit_learns() -> None:
    download(download_params(dataset="digits"))
    images, labels = np.load(OUT / "images.npy"), np.load(OUT / "labels.npy")
    assert (images.dtype, images.shape, images.min(), images.max()) == (np.uint8, (1797, 8, 8), 0, 16)
    assert (labels.dtype, labels.shape, labels[:10].tolist()) == (np.int64, (1797,), list(range(10)))
    original = load_digits()
    assert (images == original.images).all()
    assert (labels == original.target).all()
    assert json.loads((OUT / "source.json").read_text()) == {"dataset": "digits"}


def test_another_dataset_takes_the_folder_over() -> None:
    Path("whole.tar.gz").write_bytes(CONTENT)
    download(cifar10("whole.tar.gz"))
    (OUT / ".images.tar.1.tmp").touch()
    download(cifar10("whole.tar.gz").model_copy(update={"dataset": "digits"}))
    assert listing() == ["checksums.md5", "images.npy", "labels.npy", "source.json"]


# ---- imagefolder


def imagefolder(folder: str | Path = "images") -> DownloadParams:
    return download_params(dataset="imagefolder", folder=str(folder))


def make_tree(*names: str, root: str | Path = "images") -> Path:
    """Small images, each of its own colour, at the names given under `root`; text where the suffix is .txt."""
    for index, name in enumerate(names):
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("text")
        elif path.suffix:
            Image.new("RGB", (4, 4), (index % 256, 7, 9)).save(path, format="PNG")
        else:
            path.mkdir(exist_ok=True)
    return Path(root)


def classes(*names: str, count: int = 3, prefix: str = "") -> list[str]:
    return [f"{prefix}{name}/{n}.png" for name in names for n in range(count)]


def packed() -> list[str]:
    with tarfile.open(OUT / "images.tar") as archive:
        return archive.getnames()


def source() -> dict[str, object]:
    content: dict[str, object] = json.loads((OUT / "source.json").read_text(encoding="utf-8"))
    return content


def test_class_folders_are_packed_as_train() -> None:
    make_tree(*classes("dog", "cat"), "README.txt")
    download(imagefolder())
    assert packed() == [f"train/{name}/{n}.png" for name in ("cat", "dog") for n in range(3)]
    assert source() == {
        "dataset": "imagefolder",
        "class_names": ["cat", "dog"],
        "counts": {"train": {"cat": 3, "dog": 3}},
        "ignored_files": [],
        "undecodable_files": [],
        "files": {"found": 7, "used": 6, "not_used": {"other files outside the class folders": 1}},
    }


def test_split_folders_keep_their_splits_under_one_name() -> None:
    splits = {"Train": 2, "val": 1, "test": 1}
    make_tree(*(name for split, n in splits.items() for name in classes("a", "b", count=n, prefix=f"{split}/")))
    (Path("images/test/b/0.png")).unlink()
    Path("images/test/b").rmdir()
    download(imagefolder())
    assert packed() == [
        "test/a/0.png",
        *(f"train/{name}/{n}.png" for name in "ab" for n in range(2)),
        "validation/a/0.png",
        "validation/b/0.png",
    ]
    assert source()["counts"] == {
        "train": {"a": 2, "b": 2},
        "validation": {"a": 1, "b": 1},
        "test": {"a": 1, "b": 0},
    }


def test_a_class_may_be_called_train() -> None:
    make_tree(*classes("bus", "train"))
    download(imagefolder())
    assert source()["class_names"] == ["bus", "train"]


def test_contents_of_files_are_packed_as_they_are() -> None:
    root = make_tree(*classes("a", "b"))
    download(imagefolder())
    with tarfile.open(OUT / "images.tar") as archive:
        content = archive.extractfile("train/b/1.png")
        assert content is not None
        assert content.read() == (root / "b/1.png").read_bytes()


def test_subfolders_belong_to_the_class_and_other_files_are_listed() -> None:
    make_tree(
        *classes("a", "b"), "a/deep/er/x.JPG", "a/notes.txt", "b/.hidden/y.png", "b/Thumbs.db", "__MACOSX/a/._x.png"
    )
    download(imagefolder())
    assert "train/a/deep/er/x.JPG" in packed()
    assert len(packed()) == 7
    assert source()["ignored_files"] == ["train/a/notes.txt"]


def test_names_in_any_language_are_composed_and_sorted_by_code_point() -> None:
    names = [
        "кот/снимок 1.png",
        "кот/e\u0301te\u0301.png",
        "кот/a/z.png",
        "кот/a b/z.png",
        "犬/柴.png",
        f"犬/{'長' * 70}.png",
    ]
    make_tree(*names, *classes("кот", "犬", count=2))
    download(imagefolder())
    expected = [name.replace("e\u0301", "\u00e9") for name in [*names, *classes("кот", "犬", count=2)]]
    assert packed() == sorted(f"train/{name}" for name in expected)
    assert source()["class_names"] == ["кот", "犬"]


def test_the_same_tree_elsewhere_gives_the_same_bytes(tmp_path: Path) -> None:
    root = make_tree(*classes("a", "b"), "a/très long.png", "a/notes.txt")
    download(imagefolder(root))
    first = {path.name: path.read_bytes() for path in OUT.iterdir()}
    copied = Path(shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    (copied / "a/0.png").chmod(0o600)
    os.utime(copied / "a/0.png", (1, 1))
    download(imagefolder(copied))
    assert {path.name: path.read_bytes() for path in OUT.iterdir()} == first


BAD_FOLDERS: dict[str, tuple[list[str], str]] = {
    "missing": ([], "does not exist"),
    "empty": (["images"], "has no folders"),
    "no folders": (["images/a.png"], "has no folders"),
    "a file": (["images.txt"], "is not a folder"),
    "one class": (classes("a", prefix="images/"), "only one class, 'a'"),
    "wrapped beside an image": (
        [*classes("a", "b", prefix="images/mine/"), "images/0.png"],
        "set download.folder to 'images/mine'",
    ),
    "class without images": ([*classes("a", "b", prefix="images/"), "images/c/notes.txt"], "'images/c' has no images"),
    "class with one image": ([*classes("a", "b", prefix="images/"), "images/c/0.png"], "c 1; allowed: at least 3"),
    "two where test is given": (
        [*classes("a", "b", count=1, prefix="images/train/"), *classes("a", prefix="images/test/")],
        "a 1, b 1; allowed: at least 2",
    ),
    "no train": (classes("a", "b", prefix="images/test/"), "no train"),
    "splits without classes": (["images/train/0.png", "images/test/0.png"], "'images/train' has no class folders"),
    "unsorted test": ([*classes("a", "b", prefix="images/train/"), "images/test/0.png"], "'images/test' has no class"),
    "beside splits": (
        classes("a", "b", prefix="images/train/") + classes("extra", prefix="images/"),
        "'images/extra' beside",
    ),
    "two validations": (
        [name for split in ("train", "val", "valid") for name in classes("a", "b", prefix=f"images/{split}/")],
        "are the split validation",
    ),
    "unknown class in test": (
        [*classes("a", "b", prefix="images/train/"), *classes("c", prefix="images/test/")],
        "'images/test/c' is a class that train does not have",
    ),
    "same name in two forms": (
        [*classes("a", "b", prefix="images/"), "images/a/\u00e9.png", "images/a/e\u0301.png"],
        "differ only in their Unicode form",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_cannot_be_used_is_told_in_one_line(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    names, expected = BAD_FOLDERS[case]
    make_tree(*names, root=".")
    OUT.mkdir(parents=True)
    (OUT / "images.tar").write_bytes(b"good")
    status, told = run_main(capfd, dataset="imagefolder", folder="images.txt" if case == "a file" else "images")
    assert status == EXIT_USER
    assert told.startswith("error: download.folder: ")
    assert told.count("\n") == 1
    assert expected in told
    assert "allowed: " in told
    assert (OUT / "images.tar").read_bytes() == b"good"
    assert listing() == ["images.tar"]


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system admits UTF-8 names only")
def test_a_name_that_is_not_utf8_is_told() -> None:
    make_tree(*classes("a", "b"))
    shutil.copy(b"images/a/0.png", b"images/a/\xff.png")
    with pytest.raises(UserError, match="not UTF-8"):
        download(imagefolder())


def peak_bytes() -> int:
    """Most memory that packing takes; the least of three runs, as the interpreter's own tables grow now and then."""
    peaks = []
    for _ in range(3):
        tracemalloc.start()
        download(imagefolder())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return min(peaks)


def test_packing_takes_no_more_memory_for_more_files() -> None:
    root = make_tree(*classes("a", "b"))
    few = peak_bytes()
    for n in range(2_000):
        path = root / f"a/{n // 50}/{n}.png"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert peak_bytes() < few + 200_000

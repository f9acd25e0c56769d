"""The promises of docs/security.md that no other test checks hold."""

import ast
import io
import os
import struct
import subprocess
import tarfile
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import server, ui
from pipeline import serve
from pipeline.artifacts import write_checksums
from pipeline.core.errors import UserError, escape_control_chars, redact_url
from pipeline.core.yaml import dump_yaml
from pipeline.datasets import cifar10
from pipeline.datasets.archives import DamagedArchive, members, open_tar
from pipeline.datasets.pickles import load_pickle
from pipeline.datasets.sources import open_source
from pipeline.evaluation.plots import confusion_matrix
from pipeline.images.decode import UnreadableImage, decode
from pipeline.recipes import compose
from tests import conftest
from tests.conftest import PROJECT, run_step
from tests.raw_folders import checksum, cifar_folder, encoded, image_folder, noise, params, plain_files

MALICIOUS_NAMES = [
    "$(touch run)",
    "<img src=x onerror=alert(1)>",
    "`touch run`; '\"",
    "=1+1",
    "-rf",
    "%s {0} $\\frac{",
    "n" * 200,
]
SOURCES = [*PROJECT.glob("pipeline/**/*.py"), *PROJECT.glob("flows/**/*.py")]


def test_no_code_unpickles_or_runs_text() -> None:
    calls = [
        (path.name, ast.unparse(node))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    run = [
        call for call in calls if call[1].startswith(("eval(", "exec(", "os.system(", "pickle.")) or "shell=" in call[1]
    ]
    loads = [text for _, text in calls if text.startswith(("torch.load(", "np.load("))]
    assert run == []
    assert all("weights_only=True" in text or "allow_pickle=False" in text for text in loads)
    assert len(loads) >= 2


# The beginning of a pickle of an array, up to its state.
ARRAY = b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85X\x01\x00\x00\x00b\x87R"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"cos\nsystem\n(S'touch run'\ntR.", "'os.system' is not allowed"),
        (b"(i__main__\nX\n.", "'__main__.X' is not allowed"),
        (b"cbuiltins\ngetattr\n.", "'builtins.getattr' is not allowed"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.names\x93.", "'numpy.dtype.names' is not allowed"),
        (b"cnumpy\nload\n.", "'numpy.load' is not allowed"),
        (b"c\x1b[2J\nx\n.", "is not allowed"),
        (b"cnumpy\nndarray\n(K\x05tR.", "not callable"),
        (b"cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        (b"cnumpy\ndtype\n(X\x01\x00\x00\x00OtR.", "anything but numbers"),
        (b"cnumpy\ndtype\n(X\x05\x00\x00\x00O,u1 tR.", "anything but numbers"),
        (b"cnumpy\ndtype\n(}tR.", "anything but numbers"),
        (ARRAY + b"(K\x01K\x05\x85cnumpy\ndtype\n(X\x02\x00\x00\x00u1tR\x89X\x01\x00\x00\x00atb.", "damaged"),
        (b"Pname\n.", "persistent"),
        (b"\x82\x01.", "extension code"),
    ],
)
def test_a_pickle_with_anything_but_data_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(DamagedArchive, match=reason) as error:
        load_pickle(content)
    assert str(error.value).isprintable()


def test_a_pickle_cannot_turn_numbers_into_pointers() -> None:
    fields = b"X\x01\x00\x00\x00a\x85}X\x01\x00\x00\x00acnumpy\ndtype\n(X\x02\x00\x00\x00u8tRK\x00\x86s"
    record = (
        b"(K\x03X\x01\x00\x00\x00|N" + fields + b"K\x08K\x01K\x00tb"
    )  # numpy itself would let this record change the type u1
    state = b"(K\x01K\x02\x85cnumpy\ndtype\n(X\x02\x00\x00\x00u1tR" + record + b"\x89X\x02\x00\x00\x00abtb."
    array = load_pickle(ARRAY + state)
    assert (array.dtype, array.tolist(), np.dtype("u1").fields) == (np.dtype("u1"), [97, 98], None)


def test_no_archive_is_parsed_before_its_checksum_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cifar_folder(tmp_path / "raw")
    archive = folder / cifar10.ARCHIVE
    archive.write_bytes(archive.read_bytes() + b"changed")
    for name in ("open_compressed_tar", "load_pickle"):
        monkeypatch.setattr(cifar10, name, lambda *_: pytest.fail("parsed"))
    with pytest.raises(UserError, match=r"but .* lists MD5"):
        open_source(folder, params=params())


def test_an_archive_without_a_checksum_is_refused() -> None:
    with pytest.raises(UserError, match=r"download\.md5 is None; allowed"):
        conftest.params(download__md5=None)


def test_an_archive_with_a_negative_size_does_not_loop_forever(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "raw", plain_files(per_class=1))
    header = bytearray(tarfile.TarInfo("train/cat/0.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # a size of -512
    header[148:156] = b"%06o\0 " % checksum(bytes(header))
    (folder / "images.tar").write_bytes(bytes(header) + (folder / "images.tar").read_bytes())
    write_checksums(folder)
    with pytest.raises(UserError, match="negative size"):
        list(open_source(folder, params=params()).blocks)


def test_reading_an_archive_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = image_folder(
        tmp_path / "raw", {**plain_files(per_class=1), "train/cat/../../../out.png": encoded(noise(1))}
    )
    before = sorted(tmp_path.rglob("*"))
    list(open_source(folder, params=params()).blocks)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_image_that_declares_too_many_pixels_is_refused_without_allocating_them() -> None:
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match=r"134,217,728|more than"):
        decode(bomb, image_size=32, channels=3, resize="crop")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["\x1b[2Jcat", "a\nerror: b", "</script><script>alert(1)</script>", "\u202ecat", " "])
def test_an_archive_with_a_class_name_that_no_folder_could_have_is_refused(tmp_path: Path, name: str) -> None:
    changes: dict[str, Any] = {"batches.meta": {b"label_names": [name.encode(), b"dog"]}}
    folder = cifar_folder(tmp_path / "raw", **changes)
    with pytest.raises(UserError, match="found the class name") as error:
        open_source(folder, params=params())
    assert str(error.value).isprintable()


def test_terminal_control_codes_are_escaped() -> None:
    assert escape_control_chars("a\x1b[2J\u202e\udc80b\n") == r"a\x1b[2J\u202e\udc80b\n"


def test_class_names_are_drawn_as_plain_text_in_a_plot() -> None:
    picture = Image.open(io.BytesIO(confusion_matrix(np.eye(7, dtype=int), class_names=MALICIOUS_NAMES)))
    assert picture.getcolors(maxcolors=1 << 20)


@pytest.mark.slow
def test_a_run_writes_no_secrets_and_executes_no_malicious_names(workspace: Path) -> None:
    for position, name in enumerate(MALICIOUS_NAMES):
        (workspace / "images" / name).mkdir(parents=True)
        for number in range(8):
            content = encoded(noise(100 * position + number))
            (workspace / "images" / name / f"$(touch run) '\"<b>{number}.png").write_bytes(content)
    chosen = {"download.dataset": "imagefolder", "download.folder": "images", "train.epochs": 1, "train.batch_size": 8}
    (workspace / "params.yaml").write_text(dump_yaml(compose(None, chosen)))
    secret = "53cr3t-of-the-environment"
    variables = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "GITHUB_TOKEN", "PREFECT_API_KEY")
    environment = {**os.environ, **dict.fromkeys(variables, secret)}
    for step in ("download", "normalize", "train", "evaluate"):
        done = run_step(step, environment=environment)
        assert (done.returncode, secret in done.stdout + done.stderr) == (0, False), done.stderr
        assert all(line.isprintable() for line in done.stdout.splitlines())
    assert not list(workspace.rglob("run"))
    assert not [path for path in workspace.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_name_that_expands_exponentially_is_shortened_in_the_message() -> None:
    # where a name is expected, lists follow that each contain the previous list twice
    nested = (b"]q%c(h%ch%ce" % (number, number - 1, number - 1) for number in range(1, 40))
    content = b"]q\x00" + b"".join(nested)
    for wrong in (content + b")R.", content + b"h\x00\x93."):
        with pytest.raises(DamagedArchive) as error:
            load_pickle(b"\x80\x04" + wrong)
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_huge_tar_header_is_refused_without_reading_it(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("bomb")
    member.type, member.size = kind, 2**33 - 1
    (tmp_path / "bomb.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DamagedArchive, match="a header of"):
        list(members(open_tar(tmp_path / "bomb.tar", "r:")))


def test_urls_are_shown_without_parts_that_may_be_secret() -> None:
    assert redact_url("postgresql://me:pa#s?s@host/db") == "postgresql://host/db"
    assert redact_url("https://me:secret@host/a.tar.gz?token=secret#secret") == "https://host/a.tar.gz"


def test_a_password_in_the_prefect_url_is_not_shown(tmp_path: Path) -> None:
    address = "http://me:secret@host:4200/api"
    with temporary_settings({PREFECT_API_URL: address}), ui.prefect_server(tmp_path) as printed:
        assert printed.startswith("http://host:4200 ")


def test_servers_listen_on_loopback_only() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in SOURCES}
    commands = [text for name, text in sources.items() if '"--host"' in text and name != "serve.py"]
    assert len(commands) == 2
    assert all('"--host", "127.0.0.1"' in text and "0.0.0.0" not in text for text in commands)
    assert server.Server(1, "", 4200).address == "http://127.0.0.1:4200"


def test_the_server_of_a_model_listens_on_loopback_unless_host_names_another_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["serve"])
    assert serve.parse_arguments().host == "127.0.0.1"


AUDITORS = {
    "knows nothing": ("exit 0", 75),
    "does not answer": ("echo ERROR; exit 1", 75),
    "finds nothing in the locks": ('case "$*" in *.lock) exit 0;; esac; echo "urllib3 1.26.4 PYSEC"; exit 1', 0),
    "finds something in all locks": ('echo "Found 1 known vulnerability"; echo "urllib3 1.26.4 PYSEC"; exit 1', 1),
    "finds something in the lock of an extra": (
        'case "$*" in *s3.lock) echo "Found 1 known vulnerability";; *.lock) exit 0;; esac; '
        'echo "urllib3 1.26.4 PYSEC"; exit 1',
        1,
    ),
    "does not answer for the lock of an extra": (
        'case "$*" in *s3.lock) exit 1;; *.lock) exit 0;; esac; echo "urllib3 1.26.4 PYSEC"; exit 1',
        75,
    ),
    "breaks off": ('echo "urllib3 1.26.4 PYSEC"; exit 1', 75),
}


@pytest.mark.parametrize("case", AUDITORS)
def test_an_audit_always_prints_its_result(tmp_path: Path, case: str) -> None:
    code, status = AUDITORS[case]
    auditor = tmp_path / "auditor"
    auditor.write_text(f"#!/bin/sh\n{code}\n")
    auditor.chmod(0o755)
    environment = {**os.environ, "PIP_AUDIT": str(auditor)}
    done = subprocess.run([PROJECT / ".ci/audit"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == 1 or (status == 1 and "requirements/s3.lock: Found 1 known vulnerability" in lines)

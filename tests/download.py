"""Run the step download in a project folder, with an archive like that of CIFAR-10."""

import hashlib
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline import download as step
from pipeline.core.yaml import dump_yaml, read_yaml
from pipeline.datasets import fetch
from pipeline.params import DownloadParams
from tests import conftest
from tests.conftest import PROJECT

OUT = Path("artifacts/download")
ARCHIVE = OUT / "cifar-10-python.tar.gz"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a new project folder with the default parameters, and return it."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(PROJECT / "params.yaml", folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PIPELINE_CACHE_DIR", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch, "RESUME_PAUSE_SECONDS", 0.0)
    return folder


def make_archive(*members: tarfile.TarInfo, size: int = 200_000) -> bytes:
    """Return a .tar.gz with one incompressible file of `size` bytes and further, empty members."""
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


def run_main(capfd: pytest.CaptureFixture[str], **changes: object) -> tuple[int, str]:
    """Run the step with changed fields of the section download, and return its exit status and stderr."""
    values = read_yaml(Path("params.yaml"))
    values["download"].update(changes)
    Path("params.yaml").write_text(dump_yaml(values), encoding="utf-8")
    with pytest.raises(SystemExit) as exit_info:
        step.main()
    return int(exit_info.value.code or 0), capfd.readouterr().err

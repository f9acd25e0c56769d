"""Pretrained weights of timm from the Hugging Face hub."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from pipeline.artifacts import file_md5
from pipeline.core.errors import UserError
from tests.conftest import PROJECT, train_params
from tests.pretrained import SMALL


class Hub(http.server.BaseHTTPRequestHandler):
    """A server that answers as the Hugging Face hub does for one file; other files and private ones do not exist."""

    protocol_version = "HTTP/1.1"
    content = b""
    requests: list[tuple[str, str, Mapping[str, str]]]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.requests.append((self.command, self.path, dict(self.headers)))
        is_known = self.path == "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
        self.send_response(200 if is_known else 401)
        if not is_known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("X-Linked-Size", str(len(self.content)))
        self.send_header("Content-Length", str(len(self.content) if is_known else 0))
        self.end_headers()
        if with_body and is_known:
            self.wfile.write(self.content)


@contextmanager
def served(content: bytes) -> Iterator[tuple[str, list[tuple[str, str, Mapping[str, str]]]]]:
    """Serve the content as a hub does; yield the address and the list of requests."""
    handler = type("Handler", (Hub,), {"content": content, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.requests  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


READ_WEIGHTS = """
import json, sys
from pipeline.models.timm import read_timm_weights
for name, md5 in json.loads(sys.argv[1]):
    try:
        print(len(read_timm_weights(name, md5=md5)))
    except Exception as error:
        print(type(error).__name__, error)
"""


def read_from_hub(address: str, cache: Path, *reads: tuple[str, str | None]) -> list[str]:
    """Read the default weights of networks in a process of their own; return a line for each."""
    done = subprocess.run(
        [sys.executable, "-c", READ_WEIGHTS, json.dumps(reads)],
        cwd=PROJECT,
        env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_TOKEN": "secret", "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_weights_from_the_hub_are_trusted_by_their_md5_only(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), file)
    md5 = file_md5(file)
    with served(file.read_bytes()) as (address, requests):
        reads = [(SMALL, None), (SMALL, "0" * 32), (SMALL, md5), ("timm/test_vit", None)]
        unknown, wrong, right, private = read_from_hub(address, tmp_path / "cache", *reads)
    assert unknown.startswith("UserError train.weights_md5 is null, but ")
    assert unknown.endswith(f"model.safetensors has {md5}; set it to that if you trust the file")
    assert wrong.startswith(f"UserError train.weights_md5 is {'0' * 32}, but ")
    assert right == str(len(timm.create_model("test_resnet").state_dict()))
    assert private.startswith(f"UserError train.weights DEFAULT: {address}/timm/test_vit.r160_in1k/resolve/main/")
    # one download, and neither the token nor the versions of packages are sent
    assert [path for method, path, _ in requests if method == "GET"] == [
        "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
    ]
    assert not [headers for _, _, headers in requests if "secret" in str(headers) or "torch/" in str(headers)]
    # another file with a trusted MD5
    md5_of_page = hashlib.md5(b"<html>", usedforsecurity=False).hexdigest()
    with served(b"<html>") as (address, _):
        (page,) = read_from_hub(address, tmp_path / "another cache", (SMALL, md5_of_page))
    assert "model.safetensors is not readable as .safetensors (" in page
    # a file that was downloaded needs no connection; without it, the remedy is a local file
    right, absent = read_from_hub(address, tmp_path / "cache", (SMALL, md5), ("timm/test_vit", None))
    assert right.isdigit()
    assert absent.startswith(f"TemporaryError train.weights DEFAULT: {address}/timm/test_vit.r160_in1k/")
    assert absent.endswith("without internet, copy that file here and name it in train.weights")


@pytest.mark.parametrize(("model", "is_allowed"), [(SMALL, True), ("resnet18", False)])
def test_default_weights_have_an_md5_only_where_timm_downloads_them(model: str, is_allowed: bool) -> None:
    values = {"model": model, "weights": "DEFAULT", "weights_md5": "0" * 32}
    if is_allowed:
        assert train_params(**values).weights_md5 == "0" * 32
    else:
        with pytest.raises(UserError, match="weights_md5 is set, but weights is DEFAULT"):
            train_params(**values)

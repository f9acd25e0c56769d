"""A flow run checks its inputs before a server starts, and reports errors with the same messages as the stages."""

import http.server
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import requests
from torchvision import models

from flows import PROJECT, checks, command_line, worker
from flows.checks import check_device, check_inputs
from flows.ports import free_port
from flows.train_classifier import train_classifier
from pipeline.artifacts import file_md5
from pipeline.core.errors import TemporaryError, UserError
from pipeline.models.build import OWN_NETWORKS
from pipeline.models.names import own_network_names, torchvision_network_names
from pipeline.recipes import compose
from pipeline.tracking.store_uri import check_connection


def composed(**changes: Any) -> Mapping[str, Any]:
    values: Mapping[str, Any] = compose("digits", {name.replace("__", "."): value for name, value in changes.items()})
    return values


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


def test_missing_weights_and_weights_with_another_md5_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    values = {"train__weights": str(weights), "train__weights_md5": "0" * 32}
    with pytest.raises(UserError, match=f"train.weights: no such file {weights}; allowed: null, DEFAULT, or a"):
        check_inputs(composed(**values))
    weights.write_bytes(b"x")
    with pytest.raises(UserError, match=f"train.weights_md5 is 0{{32}}, but {weights} has {file_md5(weights)}; set"):
        check_inputs(composed(**values))
    check_inputs(composed(**values | {"train__weights_md5": file_md5(weights)}))


@pytest.mark.parametrize(("model", "meant"), [("LeNet5", "lenet"), ("resnet19", "resnet18")])
def test_a_mistyped_network_is_refused_with_the_one_that_was_meant(model: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"train.model is '{model}'; allowed: lenet, .*\(did you mean {meant}\?\)"):
        check_inputs(composed(train__model=model))


def test_the_names_of_networks_are_known_without_an_import_of_torchvision() -> None:
    assert own_network_names() == list(OWN_NETWORKS)
    assert sorted(torchvision_network_names()) == sorted(models.list_models(module=models))


def test_without_torchvision_every_name_is_allowed_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_inputs(composed(train__model="resnet19"))


def write_images(folder: Path) -> Path:
    for name in (f"{each}/{number}.png" for each in "ab" for number in range(3)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder_that_is_not_a_data_set_is_refused_if_it_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = composed(download__dataset="imagefolder", download__folder=str(write_images(tmp_path)))
    check_inputs(values)
    (tmp_path / "b").rename(tmp_path / "a" / "b")
    with pytest.raises(UserError, match=r"download.folder: .* at least two classes"):
        check_inputs(values)
    monkeypatch.setattr(checks, "MAX_ENTRIES", 3)
    check_inputs(values)


def test_a_device_that_is_certainly_missing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "OTHER_GPUS", (tmp_path / "gpu",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # hides all GPUs
    with pytest.raises(UserError, match=r"evaluate.device is cuda, but this machine has none; allowed: auto, cpu"):
        check_device("cuda", field="evaluate.device")
    (tmp_path / "gpu").touch()
    for device in ("cuda", "auto", "cpu"):
        check_device(device, field="train.device")
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(UserError, match=r"train.device is mps"):
        check_device("mps", field="train.device")


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(405)

    def log_message(self, *_: object) -> None:
        pass


def test_an_unreachable_mlflow_server_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TemporaryError, match=r"TRACKING_URI is http://127\S+, which does not answer .*start that"):
        check_connection(f"http://me:secret@127.0.0.1:{free_port()}")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        check_connection(f"http://127.0.0.1:{found.server_address[1]}")
        found.shutdown()


def test_no_request_is_sent_for_a_store_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "get", None)
    check_connection("sqlite:///mlflow.db")


def test_the_flow_refuses_bad_inputs_before_a_server_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "ensure_server", lambda: pytest.fail("a server is started"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    weights = ["--set", "train.weights=no.pth", "--set", f"train.weights_md5={'a' * 32}"]
    for arguments, status, message in ((weights, 2, "no such file no.pth"), ([], 75, "does not answer")):
        monkeypatch.setattr("sys.argv", ["train_classifier", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            command_line.main(train_classifier)
        [line] = capsys.readouterr().err.splitlines()
        assert (exit_info.value.code, line.startswith("error: ")) == (status, True)
        assert message in line


def test_the_worker_checks_the_checkout_before_a_server_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PROJECT", tmp_path)
    monkeypatch.setattr(worker, "ensure_server", lambda: pytest.fail("a server is started"))
    with pytest.raises(UserError, match="not in a git repository"):
        worker._serve()

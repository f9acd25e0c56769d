"""The server answers photographs with a class, and refuses what is wrong in one line of JSON."""

import asyncio
import base64
import json
import logging
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import serve
from pipeline.arrays import CPU
from pipeline.core.errors import EXIT_USER
from pipeline.images.decode import decode
from pipeline.models.build import build
from pipeline.models.files import save_config, save_weights
from pipeline.prediction.model import LoadedModel
from pipeline.serving import limits as limits_module
from pipeline.serving import requests as requests_module
from pipeline.serving.app import App
from pipeline.serving.connection import Connection
from pipeline.serving.current import CurrentModel, ServedNow
from pipeline.serving.limits import Bodies, Limits
from pipeline.tracking.model_files import ModelFiles
from tests.conftest import PROJECT, colored_images
from tests.raw_folders import encoded
from tests.test_model import config

HOSTS = ("127.0.0.1", "localhost", "::1")
IMAGES = colored_images(3)[0]
PHOTO = encoded(colored_images(1, size=50)[0][0], "JPEG")


def loaded_model(*, bias: tuple[float, ...] = (0.0, 5.0, 1.0), **changes: Any) -> LoadedModel:
    """Return a LeNet that predicts the class with the highest bias, by default "b"."""
    chosen = config(classes=3, class_names=("a", "b", "c"), **changes)
    torch.manual_seed(0)  # with some seeds, all probabilities are nearly 1
    classifier = build(chosen).eval()
    with torch.no_grad():
        classifier.network[11].bias.copy_(torch.tensor(bias))  # type: ignore[index]
    return LoadedModel(classifier, chosen, ModelFiles("label", PROJECT, "best", "0" * 32), CPU)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded_model(thresholds={0.9: 0.1, 0.5: 1.0})


@pytest.fixture
def current(model: LoadedModel) -> CurrentModel:
    return CurrentModel(ServedNow(model, "digits", "3"))


Post = Callable[..., httpx.Response]


@pytest.fixture
def ask(current: CurrentModel) -> Post:
    """Return a function that sends a request to a server of its own: `ask(method, path, **request)`."""

    def ask(method: str = "POST", path: str = "/predict", *, app: dict[str, Any] | None = None, **request: Any) -> Any:
        return asyncio.run(send(server(current, **(app or {})), method, path, **request))

    return ask


def server(current: CurrentModel, *, coverage: float | None = None, **limits: Any) -> Connection:
    return Connection(App(current, limits=Limits(**limits), coverage=coverage, hosts=HOSTS))


async def send(app: Any, method: str, path: str, **request: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080", timeout=60) as client:
        return await client.request(method, path, **request)


def classes(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [prediction["class"] for prediction in response.json()["predictions"]]


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


# ---- what is answered


def test_the_bytes_of_a_photograph_are_answered_with_model_class_and_probabilities(
    ask: Post, model: LoadedModel
) -> None:
    # curl names this type for --data-binary
    response = ask(content=PHOTO, headers={"content-type": "application/x-www-form-urlencoded"})
    pixels = decode(PHOTO, image_size=32, channels=3, resize=model.config.resize)
    expected = model.quick_probabilities(np.stack([pixels]))[0]
    order = [1, 2, 0]
    assert response.text.endswith("}\n")
    assert response.json() == {
        "model": {"name": "digits", "version": "3", "md5": "0" * 32},
        "predictions": [
            {
                "class": "b",
                "probability": pytest.approx(expected[1]),
                "top": [{"class": "abc"[index], "probability": pytest.approx(expected[index])} for index in order],
            }
        ],
    }


BODIES: dict[str, tuple[dict[str, Any], int]] = {
    "one file of a form": ({"files": {"image": ("photo.jpg", PHOTO)}}, 1),
    "several files of a form": ({"files": [("image", ("a.jpg", PHOTO)), ("image", ("b.jpg", PHOTO))]}, 2),
    "base64": ({"json": {"images": [base64_of(PHOTO)] * 3}}, 3),
    "base64 in lines": ({"json": {"images": [base64.encodebytes(PHOTO).decode()]}}, 1),
    "arrays": ({"json": {"inputs": IMAGES.tolist()}}, 3),
    "arrays under MLflow's other name": ({"json": {"instances": IMAGES[:1].tolist()}}, 1),
    "more arrays than a block has": ({"json": {"inputs": np.repeat(IMAGES[:1], 40, axis=0).tolist()}}, 40),
    "JSON of no stated type": ({"content": b' \n{"images": ["' + base64.b64encode(PHOTO) + b'"]}'}, 1),
    "a photograph in parts": ({"content": "parts"}, 1),
}


async def in_parts(content: bytes = PHOTO, size: int = 100) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


@pytest.mark.parametrize("name", BODIES)
def test_each_kind_of_body_gives_one_answer_for_each_image(name: str, ask: Post) -> None:
    request, number = BODIES[name]
    if request == {"content": "parts"}:
        request = {"content": in_parts()}
    assert classes(ask(**request)) == ["b"] * number


def test_the_paths_of_mlflow_are_answered_too(ask: Post) -> None:
    assert classes(ask(path="/invocations", json={"inputs": IMAGES.tolist()})) == ["b"] * 3
    assert ask("GET", "/ping").json() == ask("GET", "/health").json()


def test_the_answers_are_in_the_order_of_the_images(ask: Post, model: LoadedModel) -> None:
    images = np.stack([IMAGES[index % 3] // (1 + index) for index in range(40)])
    found = [one["probability"] for one in ask(json={"inputs": images.tolist()}).json()["predictions"]]
    assert found == pytest.approx(model.quick_probabilities(images).max(1))
    assert len(set(found)) > 30


def test_top_limits_the_listed_classes(ask: Post) -> None:
    [prediction] = ask(path="/predict?top=2", content=PHOTO).json()["predictions"]
    assert [one["class"] for one in prediction["top"]] == ["b", "c"]


@pytest.mark.parametrize(("app", "query"), [({}, "?coverage=0.5"), ({"coverage": 0.5}, "")])
def test_a_coverage_reports_images_as_unknown(ask: Post, app: dict[str, Any], query: str) -> None:
    [prediction] = ask(path=f"/predict{query}", content=PHOTO, app=app).json()["predictions"]
    assert (prediction["class"], prediction["is_unknown"]) == ("unknown", True)
    assert prediction["top"][0]["class"] == "b"
    [prediction] = ask(path="/predict?coverage=0.9", content=PHOTO, app=app).json()["predictions"]
    assert (prediction["class"], prediction["is_unknown"]) == ("b", False)


def test_params_of_mlflow_count_as_those_of_the_query(ask: Post) -> None:
    """MLflow's client sends them so, as docs/models.md shows."""
    body = {"inputs": IMAGES[:1].tolist(), "params": {"coverage": 0.5, "top": 1}}
    [prediction] = ask(path="/invocations", json=body).json()["predictions"]
    assert (prediction["class"], len(prediction["top"])) == ("unknown", 1)
    body["params"] = {"coverage": None}
    [prediction] = ask(path="/invocations", json=body).json()["predictions"]
    assert "is_unknown" not in prediction


def test_a_replaced_model_answers_the_next_request(current: CurrentModel) -> None:
    app = server(current)

    async def ask_twice() -> list[httpx.Response]:
        first = await send(app, "POST", "/predict", content=PHOTO)
        current.replace(ServedNow(loaded_model(bias=(9.0, 0.0, 0.0)), "digits", "4"))
        return [first, await send(app, "POST", "/predict", content=PHOTO)]

    first, second = asyncio.run(ask_twice())
    assert classes(first) + classes(second) == ["b", "a"]
    assert [one.json()["model"]["version"] for one in (first, second)] == ["3", "4"]


def test_health_names_the_model_and_hides_the_text_of_a_problem(ask: Post, current: CurrentModel) -> None:
    response = ask("GET", "/health").json()
    assert response.pop("since").endswith("+00:00")
    model = {"name": "digits", "version": "3", "md5": "0" * 32}
    assert response == {"status": "ok", "model": model, "in_flight": 0, "problem": None}
    current.problem = "postgresql://user:secret@host/mlflow: no answer"
    problem = ask("GET", "/health").json()["problem"]
    assert problem
    assert "secret" not in problem


def test_a_model_of_a_folder_is_named_without_the_path(ask: Post, current: CurrentModel, model: LoadedModel) -> None:
    current.replace(ServedNow(model, "/home/somebody/models/lenet"))
    found = ask(content=PHOTO).json()["model"]
    assert (found["name"], found["version"]) == ("lenet", None)


def test_each_request_is_logged_in_one_line(ask: Post, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipeline.serving.connection")
    ask(path="/predict?top=2", content=PHOTO)
    ask("GET", "/%0agone")
    answered, missing = [record.getMessage() for record in caplog.records if record.name.startswith("pipeline")]
    assert answered.startswith("POST /predict 200 ")
    assert missing.startswith("GET /\\ngone 404 ")
    assert answered.endswith(" ms")


# ---- what is refused

FORM = {"content-type": "multipart/form-data; boundary=x"}
REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "nothing": (400, {}, "the body is empty; send an image file, as by `curl --data-binary @FILE`"),
    "text": (400, {"content": b"photo.jpg"}, "the body is not readable as an image (not an image, or its header is da"),
    "half a photograph": (400, {"content": PHOTO[:300]}, "the body is not readable as an image ("),
    "broken JSON": (400, {"content": b'{"images": ['}, "the body is no valid JSON: Expecting value: line 1 column 13"),
    "JSON that is no text": (400, {"content": b'{"\xff'}, "the body is no valid JSON: 'utf-8' codec can't decode"),
    "JSON announced, a photograph sent": (
        400,
        {"content": PHOTO, "headers": {"content-type": "application/json"}},
        "the body is no valid JSON: ",
    ),
    "deep JSON": (400, {"content": b"[" * 100_000}, "the body is JSON with too many nested lists; allowed: "),
    "a list": (400, {"json": [1]}, "the body is JSON with a list instead of an object; allowed: "),
    "another field": (400, {"json": {"image": "a"}}, 'the body is JSON with "image"; allowed: {"images": ["<base64>"'),
    "two fields": (400, {"json": {"images": [], "inputs": []}}, 'the body is JSON with "images", "inputs"; allowed: '),
    "one text": (400, {"json": {"images": "abcd"}}, "images: found text; allowed: a list of image files in base64"),
    "no images": (400, {"json": {"images": []}}, "images: found an empty list; allowed: 1 or more image files"),
    "broken base64": (400, {"json": {"images": [base64_of(PHOTO), "abc"]}}, "images[1]: no valid base64: Incorrect pa"),
    "base64 of the web": (400, {"json": {"images": ["_-=="]}}, "images[0]: no valid base64: "),
    "letters that no base64 has": (400, {"json": {"images": ["é"]}}, "images[0]: no valid base64: "),
    "a number as base64": (400, {"json": {"images": [1]}}, "images[0]: found a number; allowed: an image file in"),
    "base64 of text": (400, {"json": {"images": ["aGVsbG8="]}}, "images[0] is not readable as an image ("),
    "channels first": (
        400,
        {"json": {"inputs": IMAGES.transpose(0, 3, 1, 2).tolist()}},
        "inputs: found an array of shape (3, 3, 32, 32); allowed: images as they were decoded, (N, 32, 32, 3)",
    ),
    "no batch axis": (
        400,
        {"json": {"inputs": IMAGES[0].tolist()}},
        "inputs: found one image of shape (32, 32, 3), without a batch axis: send it as [image]; allowed: ",
    ),
    "no batch axis of more rows than images are allowed": (
        400,
        {"json": {"inputs": np.zeros((60, 60, 3), int).tolist()}},
        "inputs: found one image of shape (60, 60, 3), without a batch axis: ",
    ),
    "scaled pixels": (400, {"json": {"inputs": (IMAGES[:1] / 255).tolist()}}, "inputs: found the value "),
    "a named input": (400, {"json": {"inputs": {"image": 1}}}, "inputs: found named inputs 'image' instead of one"),
    "too many images": (413, {"json": {"images": ["a"] * 41}}, "the request has more than 40 images; allowed: 40; "),
    "too many arrays": (
        413,
        {"json": {"inputs": np.zeros((41, 32, 32, 3), int).tolist()}},
        "the request has more than",
    ),
    "too many files": (413, {"files": [("image", b"a")] * 41}, "the request has more than 40 images"),
    "a form of text": (400, {"data": {"a": "b"}, "files": {"image": PHOTO}}, 'field "a" is text, not a file; send one'),
    "a form without a boundary": (
        400,
        {"content": b"--x", "headers": {"content-type": "multipart/form-data"}},
        "Conte",
    ),
    "a damaged form": (400, {"content": b"--y\r\n", "headers": FORM}, "the form is damaged: "),
    "an incomplete form": (400, {"content": b"--x\r\n", "headers": FORM}, "the form has no file, or is incomplete"),
    "a form with a bad file": (400, {"files": {"photo": ("a.jpg", b"a")}}, 'field "photo" is not readable as an image'),
    "a form with a bad file among others": (
        400,
        {"files": [("image", PHOTO), ("other", PHOTO), ("image", b"a"), ("image", PHOTO)]},
        'field "image[1]" is not readable as an image',
    ),
    "a compressed body": (
        415,
        {"content": PHOTO, "headers": {"content-encoding": "gzip"}},
        'Content-Encoding is "gzip"; allowed: an uncompressed body',
    ),
    "a parameter that is not known": (400, {"path": "/predict?tops=3"}, 'found the parameter "tops"; allowed: '),
    "a parameter twice": (400, {"path": "/predict?top=3&top=4"}, "the parameter top is there 2 times; allowed: "),
    "a coverage in query and body": (
        400,
        {"path": "/predict?coverage=0.9", "json": {"inputs": IMAGES.tolist(), "params": {"coverage": 0.9}}},
        "the parameter coverage is there 2 times; allowed: 1",
    ),
    "another parameter of the body": (
        400,
        {"json": {"inputs": IMAGES.tolist(), "params": {"temperature": 2}}},
        'found the parameter "temperature"; allowed: top, coverage',
    ),
    "a list of parameters": (
        400,
        {"json": {"inputs": IMAGES.tolist(), "params": ["coverage"]}},
        'params: found a list; allowed: an object such as {"coverage": 0.95}',
    ),
    "only parameters": (400, {"json": {"params": {}}}, 'the body is JSON with "params"; allowed: {"images": '),
    "top 0": (400, {"path": "/predict?top=0"}, 'top is "0"; allowed: a whole number, 1 or more'),
    "top of words": (400, {"path": "/predict?top=a%0Ab"}, 'top is "a\\nb"; allowed: a whole number, 1 or more'),
    "coverage of words": (400, {"path": "/predict?coverage=high"}, 'coverage is "high"; allowed: a number such as'),
    "coverage without threshold": (
        400,
        {"path": "/predict?coverage=0.7", "content": PHOTO},
        "coverage is 0.7; allowed: 0.9, 0.5",
    ),
    "another path": (404, {"path": "/predict/"}, "no such path; allowed: POST /predict, GET /health"),
    "another method": (405, {"method": "GET"}, "GET is not possible here; allowed: POST"),
    "a page of another site": (403, {"headers": {"origin": "https://a.example"}}, "web pages are not answered; "),
    "a page without a site": (403, {"headers": {"origin": "null"}}, "web pages are not answered; "),
    "a name that leads here": (403, {"headers": {"host": "a.example:8080"}}, "the header Host names another server; "),
    "a damaged host": (403, {"headers": {"host": "[::1"}}, "the header Host names another server; "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_in_one_line(name: str, ask: Post) -> None:
    status, request, message = REFUSED[name]
    response = ask(app={"max_images": 40, "max_bytes": 1_000_000}, **request)
    error = response.json()["error"]
    assert (response.status_code, error[: len(message)]) == (status, message)
    assert list(response.json()) == ["error"]
    assert response.text.endswith("}\n")
    assert "\n" not in error
    assert len(error) < 600
    assert not any(part in error for part in ("Traceback", str(PROJECT)))


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "localhost", "[::1]:8080", "LOCALHOST:1"])
def test_all_names_of_loopback_are_answered(ask: Post, host: str) -> None:
    assert ask(content=PHOTO, headers={"host": host}).status_code == 200


def test_no_page_may_read_an_answer(ask: Post) -> None:
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    response = ask("OPTIONS", headers=headers)
    assert response.status_code == 403
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_model_without_thresholds_refuses_a_coverage(ask: Post, current: CurrentModel) -> None:
    current.replace(ServedNow(loaded_model(), "digits", "4"))
    response = ask(path="/predict?coverage=0.9", content=PHOTO)
    assert response.status_code == 400
    assert response.json()["error"].startswith("coverage is 0.9, but the model has no thresholds")


# ---- limits


async def endless(sent: list[int]) -> AsyncIterator[bytes]:
    while True:
        sent.append(1000)
        await asyncio.sleep(0)
        yield bytes(1000)


def test_a_body_that_is_too_large_is_refused_while_it_is_read(ask: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.serving.connection.LINGER_SECONDS", 0)
    sent = list[int]()
    response = ask(content=endless(sent), app={"max_bytes": 10_000})
    assert (response.status_code, response.headers["connection"]) == (413, "close")
    assert response.json()["error"].startswith("the body has more than 10,000 bytes; allowed: 10,000; send")
    assert sum(sent) < 20_000


def test_a_length_that_is_too_large_is_refused_before_the_body_is_read(ask: Post) -> None:
    response = ask(content=bytes(10_001), app={"max_bytes": 10_000})
    assert response.status_code == 413
    assert ask(content=PHOTO, app={"max_bytes": len(PHOTO)}).status_code == 200


def test_the_rest_of_a_refused_body_is_read_so_that_the_client_gets_the_answer(current: CurrentModel) -> None:
    sent = list[int]()

    async def large() -> AsyncIterator[bytes]:
        for _ in range(50):
            sent.append(1000)
            yield bytes(1000)

    response = asyncio.run(send(server(current, max_bytes=10_000), "POST", "/predict", content=large()))
    assert (response.status_code, sum(sent)) == (413, 50_000)


def test_a_slow_body_ends_with_408_and_holds_no_worker(current: CurrentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.serving.connection.LINGER_SECONDS", 0)

    async def slow() -> AsyncIterator[bytes]:
        yield PHOTO[:100]
        await asyncio.Event().wait()

    async def ask_both() -> list[httpx.Response]:
        app = App(current, limits=Limits(max_waiting=0), hosts=HOSTS)
        app._bodies = Bodies(Limits(timeout_seconds=1))  # the quick one has more time for its answer
        slow_ones = [asyncio.create_task(send(Connection(app), "POST", "/predict", content=slow())) for _ in range(50)]
        await asyncio.sleep(0)
        return [await send(Connection(app), "POST", "/predict", content=PHOTO), *await asyncio.gather(*slow_ones)]

    quick, *others = asyncio.run(ask_both())
    assert quick.status_code == 200
    assert {one.status_code for one in others} == {408}
    assert others[0].json()["error"].startswith("the body did not arrive within 1 seconds; 100 bytes did; ")


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch, model: LoadedModel) -> threading.Event:
    """Let every prediction wait for the event that is returned."""
    released = threading.Event()
    original = LoadedModel.quick_probabilities

    def wait(self: LoadedModel, images: Any) -> Any:
        assert released.wait(60)
        return original(self, images)

    monkeypatch.setattr(LoadedModel, "quick_probabilities", wait)
    return released


def test_too_many_waiting_requests_are_refused_and_the_others_answered(
    current: CurrentModel, blocked: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits_module, "num_cores", lambda: 1)

    async def ask_four() -> list[httpx.Response]:
        app = server(current, max_waiting=2)
        accepted = [asyncio.create_task(send(app, "POST", "/predict", content=PHOTO)) for _ in range(3)]
        while (await send(app, "GET", "/health")).json()["in_flight"] < 3:
            await asyncio.sleep(0.01)
        refused = await send(app, "POST", "/predict", content=PHOTO)
        blocked.set()
        return [refused, *await asyncio.gather(*accepted)]

    refused, *others = asyncio.run(ask_four())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json() == {"error": "2 requests wait already; try again later"}
    assert [classes(one) for one in others] == [["b"]] * 3


def test_an_answer_that_takes_too_long_is_given_up(current: CurrentModel, blocked: threading.Event) -> None:
    async def ask_once() -> httpx.Response:
        try:
            return await send(server(current, timeout_seconds=1), "POST", "/predict", content=PHOTO)
        finally:
            blocked.set()

    response = asyncio.run(ask_once())
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"].startswith("no answer within 1 seconds; try again later")


def test_bodies_in_memory_are_limited_together(current: CurrentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "MAX_BUFFERED_BYTES", 100)

    async def ask_both() -> list[httpx.Response]:
        app = server(current, max_bytes=len(PHOTO))
        half_sent, rest = asyncio.Event(), asyncio.Event()

        async def half() -> AsyncIterator[bytes]:
            yield PHOTO[:-1]
            half_sent.set()
            await rest.wait()
            yield PHOTO[-1:]

        first = asyncio.create_task(send(app, "POST", "/predict", content=half()))
        await half_sent.wait()
        second = await send(app, "POST", "/predict", content=PHOTO)
        rest.set()
        return [await first, second, await send(app, "POST", "/predict", content=PHOTO)]

    first, second, third = asyncio.run(ask_both())
    assert [one.status_code for one in (first, second, third)] == [200, 503, 200]
    assert "fill the memory" in second.json()["error"]


def bomb(width: int, height: int) -> bytes:
    """Return a small file of a large white image."""
    stream = BytesIO()
    Image.new("1", (width, height), 1).save(stream, "PNG")
    return stream.getvalue()


def in_icon(png: bytes) -> bytes:
    """Return an ICO file of a PNG file; its header states 256 x 256 pixels."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png), 22) + png


def test_an_image_of_too_many_pixels_is_refused_and_a_large_one_decoded_alone(
    ask: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = ask(content=bomb(8192, 8193))
    assert response.status_code == 400
    assert "(more than 67,108,864 pixels); send a smaller one" in response.json()["error"]
    lock = MagicMock()
    monkeypatch.setattr(requests_module, "_large_input_lock", lock)
    assert ask(content=PHOTO).status_code == 200
    assert not lock.__enter__.called
    monkeypatch.setattr(requests_module, "QUICK_PIXELS", 100)
    assert ask(content=PHOTO).status_code == 200
    assert lock.__enter__.called


@pytest.mark.parametrize("suffix", ["ICO", "ICNS", "TIFF"])
def test_an_image_with_another_inside_is_decoded_alone(ask: Post, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Its header may state fewer pixels than the other image has, and an ICO file is decoded with its header."""
    lock = MagicMock()
    monkeypatch.setattr(requests_module, "_large_input_lock", lock)
    opened = list[bool]()
    original = Image.open

    def open_image(*arguments: Any, **options: Any) -> Image.Image:
        opened.append(lock.__enter__.called)
        return original(*arguments, **options)

    monkeypatch.setattr(Image, "open", open_image)
    assert ask(content=encoded(colored_images(1, size=64)[0][0], suffix)).status_code == 200
    assert opened == [True]


def test_a_defect_of_the_server_is_answered_without_its_traceback(
    current: CurrentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(LoadedModel, "quick_probabilities", fail)
    answers = list[Mapping[str, Any]]()

    async def record(message: Mapping[str, Any]) -> None:
        answers.append(message)

    async def body() -> Mapping[str, Any]:
        return {"type": "http.request", "body": PHOTO, "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
    with pytest.raises(RuntimeError):  # uvicorn logs it
        asyncio.run(server(current)(scope, body, record))  # type: ignore[arg-type]
    assert answers[0]["status"] == 500
    assert json.loads(answers[1]["body"]) == {"error": "the server has failed; its output has the reason"}


# ---- a server of its own


@pytest.fixture
def folder(tmp_path: Path, model: LoadedModel) -> Path:
    """Write the files of the model; return their folder."""
    save_weights(model.classifier, tmp_path / "best.safetensors")
    save_config(model.config, tmp_path)
    return tmp_path


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.serve", *arguments]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_server_answers_refuses_and_ends_with_the_requests_in_flight(folder: Path) -> None:
    process = start("--model", str(folder), "--port", "0", "--max-megabytes", "1")
    assert process.stdout is not None
    name, separator, address = process.stdout.readline().removesuffix("; Ctrl-C stops it\n").partition(" at ")
    assert (name, separator) == (f"serving {folder}", " at "), process.communicate()
    assert process.stdout.readline() == f"curl --data-binary @photo.jpg {address}/predict\n"
    assert classes(httpx.post(f"{address}/predict", content=PHOTO, timeout=60)) == ["b"]
    for content in (bytes(50_000_000), iter([bytes(100_000)] * 500)):  # with Content-Length, and in chunks
        assert httpx.post(f"{address}/predict", content=content, timeout=60).status_code == 413
    response = httpx.post(
        f"{address}/predict", content=in_icon(bomb(8192, 8193)[:200]), timeout=60
    )  # cannot be decoded
    assert (response.status_code, "(more than 67,108,864 pixels)" in response.text) == (400, True)
    second = start("--model", str(folder), "--port", address.rpartition(":")[2])
    assert second.communicate()[1].startswith(f"error: port {address.rpartition(':')[2]} is in use; allowed: a free")
    assert second.returncode == EXIT_USER

    def last_part_after_the_signal() -> Iterator[bytes]:
        yield PHOTO[:-1]
        while httpx.get(f"{address}/health", timeout=60).json()["in_flight"] == 0:
            pass
        process.send_signal(signal.SIGTERM)
        yield PHOTO[-1:]

    assert classes(httpx.post(f"{address}/predict", content=last_part_after_the_signal(), timeout=60)) == ["b"]
    stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")
    assert stdout.split()[2:5] == ["POST", "/predict", "200"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "error: --port (PORT): found 65536; allowed: 0 to 65535; "),
        (["--max-images", "0"], "error: --max-images: found 0; allowed: 1 or more; "),
        (["--timeout-seconds", "nan"], "error: --timeout-seconds: found nan; allowed: above 0, "),
        (["--host", "192.0.2.1"], "error: --host 192.0.2.1 --port 8080: Cannot assign requested address; allowed: "),
    ],
)
def test_a_bad_option_is_reported_in_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["serve", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        serve.main()
    stderr = capsys.readouterr().err
    assert (exit_info.value.code, stderr[: len(message)]) == (EXIT_USER, message)
    assert len(stderr.splitlines()) == 1

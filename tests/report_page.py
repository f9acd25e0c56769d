"""Make the files of all steps for a report, and read a page with a parser that is not ours."""

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.artifacts import replace_folder, write_csv
from pipeline.models.build import build
from pipeline.models.config import ModelConfig
from pipeline.models.files import save_config, save_weights
from pipeline.parquet import files_path, write_files
from tests.conftest import colored_images

HOSTILE_NAMES = [
    "<script>alert(1)</script>",
    "\"quoted\" 'name' & more",
    "$x^2$ costs $5",
    "🦊 fox",
    "حصان عربي",
    "-leading dash",
    ".leading dot",
    "a" * 60,
    "{{ 7*7 }}",
    "{% raw %}",
    "&lt;b&gt;",
    "</style><img src=x onerror=alert(2)>",
    "https://evil.example/url(x)",
    "line\u202ereversed",
]
HOSTILE_FILE = "test/<img src=//evil.example>/\"'{{ 1+1 }} \x1b[31m"

# the first two report some images of 3 and of 100 classes, the first one none of 100
THRESHOLDS = {0.5: 0.3756, 0.9: 0.01088, 0.95: 0.0}


def write_artifacts(folder: Path, *, classes: int, size: int, channels: int) -> None:
    """Write what download, normalize and train write, for a small network that is not trained."""
    names = [*HOSTILE_NAMES, *(f"class {index}" for index in range(classes))][:classes]
    with replace_folder(folder / "artifacts/normalize") as target:
        _write_normalized(target, names, size=size, channels=channels)
    config = ModelConfig(
        model="lenet",
        weights=None,
        loss="cross_entropy",
        class_names=tuple(names),
        image_size=size,
        input_size=32,
        channels=channels,  # type: ignore[arg-type]
        resize="crop",
        mean=(0.4,) * channels,
        std=(0.02,) * channels,
        temperature=2.5,
        thresholds=THRESHOLDS,
    )
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = [
        {"epoch": epoch, "train_loss": 2 / epoch, "train_accuracy": 0.2 * epoch, "validation_loss": 3 / epoch}
        | {"validation_accuracy": 0.1 * epoch, "selected": "highest <accuracy>" if epoch == 3 else ""}
        for epoch in (1, 2, 3, 4)
    ]
    with replace_folder(folder / "artifacts/train") as target:
        save_weights(build(config), target / "best.safetensors")
        save_config(config, target)
        write_csv(target / "history.csv", rows)
    (folder / "artifacts/download").mkdir()
    files = {"found": 400, "used": 390, "not_used": {"videos & <more>": 10}}
    (folder / "artifacts/download/source.json").write_text(json.dumps({"dataset": "imagefolder", "files": files}))


def _write_normalized(target: Path, names: list[str], *, size: int, channels: int) -> None:
    """Write arrays with noise, whose pictures are as large as pictures can be, and their description."""
    counts = {}
    for split, number in {"train": 3 * len(names), "validation": len(names), "test": 2 * len(names) + 7}.items():
        images, labels = colored_images(number, classes=len(names), size=size, channels=channels)
        if size > len(names):
            images = np.random.default_rng(1).integers(0, 256, images.shape, dtype=np.uint8)
        np.save(target / f"{split}_images.npy", images)
        np.save(target / f"{split}_labels.npy", labels)
        write_files(
            files_path(split, folder=target), [([f"{HOSTILE_FILE}{i}.png" for i in range(number)], range(number))]
        )
        counts[split] = dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))
    description = {
        "dataset": "imagefolder",
        "class_names": names,
        "image_size": size,
        "channels": channels,
        "resize": "crop",
        "mean": [0.4] * channels,
        "std": [0.2] * channels,
        "counts": counts,
        "unreadable_files": [{"file": "<b>broken", "reason": "<i>truncated"}],
        "ignored_files": ["<u>notes.txt", "b"],
        "exact_duplicates": {"within": {"train": 1, "test": 2}, "across": {"train-test": 3}, "examples": []},
        "near_duplicates": {"correlation": 0.98, "test_images_with_one_in_train": 4, "examples": []},
        "test_duplicates": [0, 3],
    }
    (target / "dataset.json").write_text(json.dumps(description))


@dataclass
class Page(HTMLParser):
    """The elements of a page with their attributes, the figures of the model, and the text that a reader sees."""

    html: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    metrics: list[tuple[str, float]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if found.get("class") == "metric":
            self.metrics.append((str(found["data-name"]), float(str(found["value"]))))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def check_requests_nothing(self) -> None:
        """Check that the page has no script and needs no other file, and that its policy forbids both."""
        assert not self.all("link") + self.all("script") + self.all("iframe") + self.all("object") + self.all("base")
        for tag, attributes in self.elements:
            assert not {"srcset", "poster", "background", "ping", "action"} & set(attributes), tag
            assert not [name for name in attributes if name.startswith("on")], tag
            assert str(attributes.get("src", "data:image/")).startswith("data:image/"), tag
            if tag != "a":
                assert str(attributes.get("href", "#")).startswith(("#", "data:image/png;base64,")), tag
            assert not re.search(r"url\((?!#)|@import", str(attributes.get("style", ""))), tag
        styles = "".join(re.findall(r"<style>(.*?)</style>", self.html, re.DOTALL))
        assert not re.search(r"url\(|@import|http", styles)
        policies = [each["content"] for each in self.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
        assert policies == [
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
        ]

    def check_links_and_alternatives(self) -> None:
        """Check that ids are unique, that links within the page have a target, and that pictures have a text."""
        assert all(str(each.get("alt", "")).strip() for each in self.all("img"))
        assert all(each.get("role") == "img" and str(each.get("aria-label")).strip() for each in self.all("svg"))
        ids = [str(attributes["id"]) for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        targets = {str(each["href"])[1:] for _, each in self.elements if str(each.get("href", "")).startswith("#")}
        assert targets <= set(ids)

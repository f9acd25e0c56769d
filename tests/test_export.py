"""An export computes the probabilities of the original, and its preprocessing the pixels of `decode`."""

import copy
import io
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.arrays import Split, normalize_pixels
from pipeline.artifacts import replace_folder, verify
from pipeline.core.errors import UserError
from pipeline.core.yaml import read_yaml
from pipeline.export import main
from pipeline.exporting import folder as exporting
from pipeline.exporting import images as export_images
from pipeline.exporting import verification
from pipeline.exporting.folder import export
from pipeline.exporting.formats import FORMATS, Run
from pipeline.exporting.images import find_files
from pipeline.exporting.network import ExportedNetwork
from pipeline.exporting.server_files import check_name, default_name, write_labels, write_preprocessing
from pipeline.exporting.verification import compare, compare_photographs
from pipeline.images.decode import decode
from pipeline.models.build import build
from pipeline.models.config import ModelConfig
from pipeline.models.files import save_config, save_weights
from pipeline.prediction.model import LoadedModel, load
from pipeline.tracking.model_files import find_model_files
from tests.conftest import PROJECT, colored_images, write_normalized
from tests.raw_folders import encoded, noise
from tests.test_model import config

CLASSES = ("class 0", "class 1", "class 2")


def write_model(folder: Path, chosen: ModelConfig) -> LoadedModel:
    """Write a network with random weights as the step train does, and load it."""
    torch.manual_seed(0)
    with replace_folder(folder) as target:
        save_weights(build(chosen), target / "best.safetensors")
        save_config(chosen, target)
    return load(find_model_files(str(folder)))


@pytest.fixture(autouse=True, scope="module")
def _one_round() -> Iterator[None]:
    """Measure the time for a batch once only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "MAX_ROUNDS", 1)
        yield


MODEL = config(class_names=CLASSES, temperature=1.7, thresholds={0.9: 0.5})


@pytest.fixture
def model(workspace: Path) -> LoadedModel:
    """Write a LeNet and the data set that it takes; return the model."""
    write_normalized(workspace)
    return write_model(workspace / "artifacts" / "train", MODEL)


def write_photographs(folder: Path) -> list[Path]:
    """Write 205 small files of which one is no image, and one has 16 bits, which `preprocess.py` refuses."""
    folder.mkdir()
    contents = [encoded(noise(seed, size=36), "JPEG") for seed in range(203)]
    contents += [b"text", encoded(Image.fromarray(np.full((40, 40), 700, np.uint16)))]
    for number, content in enumerate(contents):
        (folder / f"{number:03}.jpg").write_bytes(content)
    return sorted(folder.iterdir())


@dataclass(frozen=True)
class Exports:
    """A model and its exports in the folders `onnx` and `torch` below `folder`."""

    folder: Path
    model: LoadedModel


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Export a LeNet to both formats, compared on photographs as well."""
    folder = tmp_path_factory.mktemp("exports")
    found = Exports(folder, write_model(folder / "model", MODEL))
    photographs = write_photographs(folder / "photographs")
    for to in FORMATS:
        images = colored_images(24)[0]
        export(found.model, images, to=to, name="colors", output=folder / to, photographs=photographs)
    return found


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["export", *arguments])
    main()


def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line, after those on the phases, that the command prints where it fails with status 2."""
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = [line for line in captured.err.splitlines() if not line.endswith("…")]
    return line


# ---- the network


@pytest.mark.parametrize("std", [(0.2, 0.3, 0.25), (0.2, 0.0, 1e-9)])
def test_the_network_normalizes_as_the_pipeline_does(std: tuple[float, ...]) -> None:
    chosen = config(mean=(0.1, 0.5, 0.9), std=std)
    images, labels = colored_images(8)
    split = Split.of(images, labels, mean=chosen.mean, std=chosen.std)
    network = ExportedNetwork(build(chosen), config=chosen)
    assert torch.equal(network.normalize(split.images), normalize_pixels(split.images, split=split))


@pytest.mark.parametrize("temperature", [None, 2.5])
def test_the_probabilities_are_float32_and_calibrated(temperature: float | None) -> None:
    chosen = config(temperature=temperature)
    classifier = build(chosen).eval()
    images = torch.from_numpy(colored_images(4)[0])
    network = ExportedNetwork(classifier, config=chosen).eval()
    expected = (classifier(network.normalize(images)) / (temperature or 1)).softmax(1)
    assert network(images).dtype == torch.float32
    assert torch.allclose(network(images), expected)


# ---- the folder


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_is_verified_and_described(exports: Exports, to: str) -> None:
    folder = exports.folder / to
    verify(folder)
    found = json.loads((folder / "export.json").read_text())
    assert found["verification"]["differences"].keys() == {"1", "2", "7", "64"}
    assert found["verification"]["largest_difference"] <= 1e-5
    assert found["weights_md5"] == exports.model.files.weights_md5
    assert (found["temperature"], found["thresholds"]) == (1.7, {"0.9": 0.5})
    assert tuple(found["class_names"]) == CLASSES


def test_the_program_of_pytorch_returns_no_gradients(exports: Exports) -> None:
    network = torch.export.load(exports.folder / "torch" / "model.pt2").module()
    assert not network(torch.zeros(3, 32, 32, 3, dtype=torch.uint8)).requires_grad


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_has_no_paths_of_this_machine(exports: Exports, to: str) -> None:
    file = json.loads((exports.folder / to / "export.json").read_text())["file"]
    content = (exports.folder / to / file).read_bytes()
    assert not [text for text in ("site-packages", ".py", str(PROJECT)) if text.encode() in content]


@pytest.mark.parametrize("to", FORMATS)
def test_the_folder_alone_classifies_an_image_file(exports: Exports, to: str) -> None:
    photograph = exports.folder / "photographs" / "000.jpg"
    pixels = decode(photograph.read_bytes(), image_size=32, channels=3, resize="crop").copy()
    expected = exports.model.quick_probabilities(pixels[np.newaxis])[0]
    done = run_preprocessing(exports.folder / to, "../photographs/000.jpg")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"../photographs/000.jpg: {CLASSES[expected.argmax()]} {expected.max():.1%}\n"


def run_preprocessing(folder: Path, *photographs: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "preprocess.py", *photographs]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_folder_classifies_beside_files_that_it_cannot_read_and_other_versions(
    exports: Exports, tmp_path: Path
) -> None:
    folder = shutil.copytree(exports.folder / "onnx", tmp_path / "onnx")
    shutil.copytree(folder / "colors/1", folder / "colors/2")
    names = [f"{exports.folder}/photographs/{name}.jpg" for name in ("000", "203", "204", "missing")]
    done = run_preprocessing(folder, *names)
    assert done.returncode == 1
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == names[:1]
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == names[1:]
    usage = run_preprocessing(folder)
    assert (usage.returncode, usage.stderr) == (2, "usage: python preprocess.py PHOTO…\n")


@pytest.mark.parametrize("to", FORMATS)
def test_photographs_are_compared_from_the_file_to_the_class(exports: Exports, to: str) -> None:
    found = json.loads((exports.folder / to / "export.json").read_text())["photographs"]
    assert (found["num_compared"], found["num_same_pixels"], found["num_same_class"]) == (203, 203, 203)
    assert (found["num_unreadable"], found["num_refused"]) == (1, 1)


# ---- the command


@pytest.mark.slow
def test_the_command_prints_sizes_times_and_the_agreement(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_normalized(workspace)
    write_model(workspace / "artifacts" / "train", config(class_names=CLASSES))
    Path("out").mkdir()
    Path("out/export.json").touch()
    run(monkeypatch, "--to", "torch", "--output", "out", "--overwrite")
    captured = capsys.readouterr()
    phases = [line.split()[0] for line in captured.err.splitlines()]
    assert phases == ["exporting", "verifying", "measuring"]
    heading, original, exported, _, verified, *_, last = captured.out.splitlines()
    assert heading.split() == ["size", "batch", "of", "1", "batch", "of", "64"]
    assert [row.split()[0] for row in (original, exported)] == ["original", "torch"]
    assert verified == "verified on 24 images of the validation split, in batches of 1, 2, 7, 64:"
    assert last == "wrote out"
    found = json.loads(Path("out/export.json").read_text())
    assert (found["temperature"], found["thresholds"]) == ("unknown", "unknown")


class Planted(ExportedNetwork):
    """A network one of whose weights differs from that of the original."""

    def __init__(self, classifier: Any, *, config: ModelConfig) -> None:
        super().__init__(copy.deepcopy(classifier), config=config)
        with torch.no_grad():
            self.classifier.network[11].bias[0] += 0.002  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [False, True])
def test_an_export_that_does_not_agree_is_refused_and_changes_nothing(
    model: LoadedModel, earlier: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if earlier:
        Path("artifacts/export/torch").mkdir(parents=True)
        Path("artifacts/export/torch/export.json").touch()
    monkeypatch.setattr(exporting, "ExportedNetwork", Planted)
    before = sorted(Path().rglob("*"))
    line = error_of(monkeypatch, capsys, "--to", "torch", "--overwrite")
    assert line.startswith("error: --to torch: does not agree with the original on 24 images: the largest difference")
    assert "allowed: 1e-04 and 0" in line
    assert sorted(Path().rglob("*")) == before


class DecidesByPixels(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def test_a_network_that_cannot_be_exported_is_reported_in_one_line(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Deciding(ExportedNetwork):
        def __init__(self, classifier: Any, *, config: ModelConfig) -> None:
            super().__init__(classifier, config=config)
            self.classifier = DecidesByPixels()  # type: ignore[assignment]

    monkeypatch.setattr(exporting, "ExportedNetwork", Deciding)
    line = error_of(monkeypatch, capsys, "--to", "onnx")
    assert line.startswith("error: --to onnx: lenet cannot be exported (")
    assert not Path("artifacts/export").exists()


def test_an_existing_folder_is_replaced_only_on_request_and_only_an_export(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos").mkdir()
    assert "--output photos: already exists" in error_of(monkeypatch, capsys, "--to", "torch", "--output", "photos")
    line = error_of(monkeypatch, capsys, "--to", "torch", "--output", "photos", "--overwrite")
    assert "--output photos: is not an earlier export" in line
    assert list(Path("photos").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("a", "b")}, "class_names is ['class 0', 'class 1', 'class 2']; allowed: ['a', 'b']"),
        ({"image_size": 40}, "image_size is 32; allowed: 40"),
        ({"resize": "pad"}, "resize is crop; allowed: pad"),
    ],
)
def test_validation_images_that_do_not_fit_the_model_are_refused(
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    write_normalized(workspace)
    write_model(workspace / "other", config(**{"class_names": CLASSES} | changes))
    line = error_of(monkeypatch, capsys, "--to", "torch", "--model", "other")
    assert f"artifacts/normalize: its validation images do not fit other: {message}" in line
    assert "--images FOLDER" in line


@pytest.mark.slow
def test_an_export_without_images_is_refused_unless_some_are_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(workspace / "model", config())
    line = error_of(monkeypatch, capsys, "--to", "torch", "--model", "model")
    assert (
        "no validation images to verify the export of model on; name 64 image files or more of its classes with "
        "--images" in line
    )
    assert "no such folder" in error_of(monkeypatch, capsys, "--to", "torch", "--model", "model", "--images", "photos")
    Path("photos/a").mkdir(parents=True)
    for number in range(63):
        Path(f"photos/a/{number}.png").write_bytes(encoded(noise(number)))
    Path("photos/a/damaged.png").write_bytes(b"damaged")
    line = error_of(monkeypatch, capsys, "--to", "torch", "--model", "model", "--images", "photos")
    assert "--images photos: 63 of 64 files can be read as images; allowed: 64 or more" in line
    Path("photos/a/63.png").write_bytes(encoded(noise(63)))
    run(monkeypatch, "--to", "torch", "--model", "model", "--images", "photos")
    assert "verified on 64 images from photos" in capsys.readouterr().out


def test_a_validation_split_of_a_few_images_is_refused(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_images, "MIN_VALIDATION_IMAGES", 25)
    line = error_of(monkeypatch, capsys, "--to", "torch")
    assert "artifacts/normalize: the validation split has 24 images; allowed: 25 or more; name 64 image files" in line


def test_the_images_of_a_folder_are_those_that_are_predicted(tmp_path: Path) -> None:
    for name in ("2/10.JPG", "2/.3.png", ".4/5.png", "1", "6.raw", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"text" if name == "notes.txt" else encoded(noise(0), "JPEG"))
    (tmp_path / "3").symlink_to(tmp_path / "2", target_is_directory=True)
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path, option="--images")]
    assert found == ["1", "6.raw", "2/10.JPG", "3/10.JPG"]


# ---- every kind of network


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        config(channels=1, image_size=28, temperature=0.7),
        config("airbench"),
        config("resnet18", channels=1, image_size=32, input_size=80),
        config("squeezenet1_1", image_size=96, input_size=64, crop_fraction=0.8),
        config("timm/test_efficientnet", image_size=96, input_size=64, interpolation="bicubic", crop_fraction=0.875),
    ],
    ids=lambda chosen: f"{chosen.model}-{chosen.channels}-{chosen.image_size}-{chosen.input_size}",
)
def test_networks_and_their_resizes_agree_in_both_formats(chosen: ModelConfig, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", chosen)
    images = colored_images(10, size=chosen.image_size, channels=chosen.channels)[0]
    for to in FORMATS:
        found = export(model, images, to=to, name="network", output=tmp_path / to)
        assert found.agreement.num_images == 10
        assert found.agreement.largest_difference < 1e-5


# ---- the comparison


def compared(change: Callable[[Any], Any], *, probabilities: Any) -> verification.Agreement:
    """Compare probabilities with changed ones; each image has its own index as its only pixel."""

    def changed(images: Any) -> Any:
        return change(probabilities[images[:, 0, 0, 0]]).astype(np.float32)

    images = np.arange(len(probabilities), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return compare(probabilities, changed, images)


def test_a_class_may_change_only_where_the_margin_is_small() -> None:
    close = np.array([[0.50005, 0.49995]] * 3 + [[0.7, 0.3]] * 7)
    agreement = compared(lambda rows: np.where(abs(rows - 0.5) < 0.1, rows[:, ::-1], rows), probabilities=close)
    assert (agreement.num_images, agreement.num_clear, agreement.num_other_class) == (10, 7, 0)
    assert agreement.largest_difference == pytest.approx(1e-4, rel=1e-3)
    assert compared(lambda rows: rows[:, ::-1], probabilities=close).num_other_class == 7


def test_a_difference_in_one_batch_size_alone_is_found() -> None:
    def only_in_batches_of_seven(rows: Any) -> Any:
        return rows + (0.01 if len(rows) == 7 else 0)

    agreement = compared(only_in_batches_of_seven, probabilities=np.full((5, 2), [0.9, 0.1]))
    assert [size for size, difference in agreement.differences.items() if difference > 1e-4] == [7]
    with pytest.raises(UserError, match=r"probability is 1\.0e-02, and 0 of 5 clear images"):
        verification.check_agreement(agreement, export="x")


def test_a_probability_that_is_not_a_number_is_refused() -> None:
    agreement = compared(lambda rows: rows * np.nan, probabilities=np.full((3, 2), [0.9, 0.1]))
    with pytest.raises(UserError, match="largest difference of a probability is nan"):
        verification.check_agreement(agreement, export="x")


@pytest.mark.slow
def test_an_export_that_changes_the_classes_of_photographs_is_refused(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_class(model: LoadedModel, run: Run, *arguments: Any, **options: Any) -> Any:
        return compare_photographs(model, lambda images: np.roll(run(images), 1, axis=1), *arguments, **options)

    monkeypatch.setattr(exporting, "compare_photographs", other_class)
    write_photographs(Path("photographs"))
    line = error_of(monkeypatch, capsys, "--to", "torch", "--photographs", "photographs")
    assert "0 of 203 photographs (0.0%) have the same class as by the original, and preprocess.py cannot" in line
    assert not Path("artifacts/export").exists()


def test_too_few_photographs_are_refused(exports: Exports, tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "photographs")[10:]
    run = exports.model.quick_probabilities
    with pytest.raises(UserError, match=r"193 of 195 files can be compared .* allowed: 200 or more"):
        compare_photographs(exports.model, run, preprocessing(tmp_path), photographs, threads=1)


def test_photographs_that_the_preprocessing_fails_on_count_as_another_class(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", MODEL)
    photographs = write_photographs(tmp_path / "photographs")
    preprocess = preprocessing(tmp_path)

    def defective(path: Path) -> Any:
        if int(path.stem) % 20 == 0:
            raise ValueError("mode RGB; allowed: gray")
        return preprocess(path)

    found = compare_photographs(model, model.quick_probabilities, defective, photographs, threads=1)
    assert (found.num_compared, found.num_failed, found.num_same_class) == (203, 11, 192)
    assert (found.num_unreadable, found.num_refused) == (1, 1)
    with pytest.raises(UserError, match=r"192 of 203 photographs \(94\.6%\) .* preprocess\.py cannot read 11; allowed"):
        verification.check_photographs(found, export="x")


# ---- the preprocessing


def preprocessing(folder: Path, **changes: Any) -> Callable[[Any], Any]:
    """Write `preprocess.py` for a model, and return its function."""
    paths = {"model": folder / "model.pt2", "labels": folder / "labels.txt"}
    write_preprocessing(folder, config=config(**changes), **paths)
    function: Callable[[Any], Any] = runpy.run_path(str(folder / "preprocess.py"))["preprocess"]
    return function


def picture(mode: str = "RGB", *, size: tuple[int, int] = (90, 60)) -> Image.Image:
    """Return an image of a mode with noise, also in its transparency."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 4), dtype=np.uint8)
    image = Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)).crop((0, 0, *size))
    return image if mode == "RGBA" else image.convert(mode)


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), "JPEG", exif=exif)


def large(size: tuple[int, int] = (700, 500)) -> bytes:
    return encoded(picture(size=size), "JPEG")


FILES: dict[str, bytes] = {
    "JPEG": encoded(picture(), "JPEG"),
    "JPEG, much larger": large(),
    "JPEG, gray": encoded(picture("L"), "JPEG"),
    "JPEG, CMYK": encoded(picture("CMYK"), "JPEG"),
    "JPEG, damaged EXIF": encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff damaged"),
    **{f"JPEG, orientation {number}": oriented(number) for number in range(1, 9)},
    "PNG": encoded(picture()),
    "PNG, transparent": encoded(picture("RGBA")),
    "PNG, gray": encoded(picture("L")),
    "PNG, gray and transparent": encoded(picture("LA")),
    "PNG, palette": encoded(picture("P")),
    "PNG, transparent palette": encoded(picture("P"), transparency=3),
    "PNG, transparent color": encoded(picture(), transparency=(0, 0, 0)),
    "PNG, black and white": encoded(picture("1")),
    "GIF": encoded(picture("P"), "GIF"),
    "GIF, animated": encoded(picture("P"), "GIF", save_all=True, append_images=[picture("L")]),
    "WebP, transparent": encoded(picture("RGBA"), "WEBP"),
    "BMP": encoded(picture(), "BMP"),
    "TIFF": encoded(picture(), "TIFF"),
    "TIFF, CMYK": encoded(picture("CMYK"), "TIFF"),
    "MPO": encoded(picture(), "MPO", save_all=True, append_images=[picture()]),
    "the size of the network": encoded(picture(size=(32, 32))),
    "narrow": encoded(picture(size=(3, 200))),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_the_preprocessing_returns_the_pixels_of_decode(tmp_path: Path, name: str, channels: Any, resize: Any) -> None:
    preprocess = preprocessing(tmp_path, channels=channels, resize=resize)
    expected = decode(FILES[name], image_size=32, channels=channels, resize=resize)
    found = preprocess(io.BytesIO(FILES[name]))
    assert (found.shape, found.dtype) == (expected.shape, np.uint8)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.full((40, 40), 700, np.uint16)),
        Image.fromarray(np.full((40, 40), 700, np.int32)),
        Image.fromarray(np.full((40, 40), 0.5, np.float32)),
        picture("LAB"),
    ],
    ids=lambda image: image.mode,
)
def test_the_preprocessing_refuses_what_it_would_read_as_other_pixels(tmp_path: Path, image: Image.Image) -> None:
    preprocess = preprocessing(tmp_path)
    with pytest.raises(ValueError, match=f"mode {image.mode}; allowed: gray or colors with 8 bits"):
        preprocess(io.BytesIO(encoded(image, "TIFF")))


@pytest.mark.parametrize("content", [b"text", b"", encoded(picture(), "PPM"), encoded(picture(), "ICO")])
def test_the_preprocessing_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    with pytest.raises((OSError, ValueError)):
        preprocessing(tmp_path)(io.BytesIO(content))


# ---- the files for servers


def test_the_files_for_triton_and_kserve_describe_the_network(exports: Exports) -> None:
    folder = exports.folder / "onnx"
    text = (folder / "colors/config.pbtxt").read_text()
    assert 'name: "colors"\nplatform: "onnxruntime_onnx"\n' in text
    graph = onnx.load(folder / "colors/1/model.onnx").graph
    shape = graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value or dim.dim_param for dim in shape] == ["batch", 32, 32, 3]
    assert [(value.name, value.type.tensor_type.elem_type) for value in (*graph.input, *graph.output)] == [
        ("images", onnx.TensorProto.UINT8),
        ("probabilities", onnx.TensorProto.FLOAT),
    ]
    assert "dims: [ 32, 32, 3 ]" in text
    assert "dims: [ 3 ]" in text
    assert (folder / "colors/labels.txt").read_text() == "class 0\nclass 1\nclass 2\n"
    service = read_yaml(folder / "inferenceservice.yaml")
    assert service["metadata"]["name"] == "colors"
    assert service["spec"]["predictor"]["model"]["modelFormat"]["name"] == "triton"


def test_labels_have_one_line_for_each_class(tmp_path: Path) -> None:
    write_labels(tmp_path, config=config(class_names=("a\nb", "ä c")))
    assert (tmp_path / "labels.txt").read_text(encoding="utf-8") == "a\\nb\nä c\n"


@pytest.mark.parametrize("name", ["", "Colors", "1st", "a_b", "a-", "a" * 64, "a/b", "a\n"])
def test_a_name_that_kubernetes_refuses_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--name is"):
        check_name(name)


@pytest.mark.parametrize(
    ("network", "name"), [("timm/tf_efficientnet_lite0", "tf-efficientnet-lite0"), ("lenet", "lenet")]
)
def test_the_default_name_is_that_of_the_network(network: str, name: str) -> None:
    assert default_name(config(network)) == name
    check_name(name)

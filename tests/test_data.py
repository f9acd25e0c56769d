import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.arrays import DatasetInfo, Split, evaluation_batches
from pipeline.core.errors import UserError
from pipeline.training import batches as data
from pipeline.training.augmentation import Augmentation
from pipeline.training.batches import TrainingBatches
from pipeline.training.device import choose_device
from tests.conftest import colored_images, write_normalized

CPU = torch.device("cpu")


def split_of(images: np.ndarray, labels: np.ndarray | None = None) -> Split:
    channels = images.shape[3]
    labels = np.arange(len(images)) if labels is None else labels
    return Split.of(images, labels, mean=[0.0] * channels, std=[1 / 255] * channels, device=CPU)


def batches(split: Split, **changes: int | bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    sizes = {"batch_size": 4, "seed": 0, "epoch": 1} | {
        k: v for k, v in changes.items() if k in {"batch_size", "seed", "epoch"}
    }
    rest = {name: value for name, value in changes.items() if name not in sizes}
    return list(TrainingBatches(split, augmentation=Augmentation(**rest), **sizes))  # type: ignore[arg-type]


def test_pixels_are_normalized_by_the_training_mean_and_deviation() -> None:
    images, labels = colored_images(50)
    mean, std = images.mean((0, 1, 2)) / 255, images.std((0, 1, 2)) / 255
    split = Split.of(images, labels, mean=mean.tolist(), std=std.tolist(), device=CPU)
    floats = torch.cat([batch for batch, _ in evaluation_batches(split, batch_size=7)])
    torch.testing.assert_close(floats.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(floats.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_batches_have_the_documented_shape_type_and_layout() -> None:
    images, labels = batches(split_of(colored_images(10)[0]))[0]
    assert (images.shape, images.dtype, labels.dtype) == ((4, 3, 32, 32), torch.float32, torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_has_each_image_at_most_once_and_drops_the_incomplete_batch() -> None:
    seen = torch.cat([labels for _, labels in batches(split_of(colored_images(10)[0]))]).tolist()
    assert len(seen) == len(set(seen)) == 8


def test_order_and_augmentation_depend_only_on_seed_and_epoch() -> None:
    split = split_of(colored_images(12)[0])
    drawn = [
        torch.cat([i for i, _ in batches(split, seed=s, epoch=e, crop_padding=4, flip=True)])
        for s, e in [(1, 2), (1, 2), (1, 3), (2, 2)]
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


def test_an_epoch_resumed_in_the_middle_has_the_same_remaining_batches() -> None:
    values = {"batch_size": 3, "seed": 1, "epoch": 2, "augmentation": Augmentation(flip=True, crop_padding=4)}
    split = split_of(colored_images(24)[0])
    whole, first, second = (TrainingBatches(split, **values) for _ in range(3))  # type: ignore[arg-type]
    for _ in zip(range(3), first, strict=False):
        pass
    second.position = first.position
    for (images, labels), (resumed_images, resumed_labels) in zip(list(whole)[3:], second, strict=True):
        assert torch.equal(images, resumed_images)
        assert torch.equal(labels, resumed_labels)


def test_an_image_is_mirrored_in_every_second_epoch() -> None:
    split = split_of(colored_images(20)[0])
    seen = [
        {int(label): image for image, label in zip(*batches(split, batch_size=20, epoch=e, flip=True)[0], strict=True)}
        for e in (1, 2, 3)
    ]
    for label in range(20):
        assert torch.equal(seen[0][label], seen[1][label].flip(2))
        assert torch.equal(seen[0][label], seen[2][label])


def test_flipping_mirrors_about_half_of_the_images() -> None:
    images = np.zeros((400, 8, 8, 1), dtype=np.uint8)
    images[:, :, 0] = 200
    pixels = batches(split_of(images), batch_size=400, flip=True)[0][0]
    left, right = (pixels[:, 0, 0, 0] == 200).sum().item(), (pixels[:, 0, 0, -1] == 200).sum().item()
    assert left + right == 400
    assert 150 < left < 250


def test_a_padded_crop_is_the_crop_of_the_reflected_image() -> None:
    images = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    reflected = np.pad(images[0, :, :, 0], 2, mode="reflect")
    crops = [reflected[y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    for epoch in range(40):
        pixels = batches(split_of(images), batch_size=1, epoch=epoch, crop_padding=2)[0][0][0, 0].numpy()
        assert any(np.array_equal(pixels, crop) for crop in crops)


def test_cutout_sets_one_square_to_the_mean() -> None:
    images = np.full((50, 16, 16, 3), 99, dtype=np.uint8)
    pixels = batches(split_of(images), batch_size=50, cutout_size=6)[0][0]
    blank = (pixels == 0).all(1).sum((1, 2))
    assert blank.max() == 36
    assert blank.min() >= 9


def test_labels_stay_with_their_images() -> None:
    images = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1).repeat(8, 1).repeat(8, 2)
    for pixels, labels in batches(split_of(images), flip=True, crop_padding=3):
        assert torch.equal(pixels[:, 0, 0, 0].long(), labels)


def test_arrays_that_contradict_dataset_json_are_reported(tmp_path: Path) -> None:
    folder = write_normalized(tmp_path)
    np.save(folder / "test_images.npy", np.zeros((30, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=r"test_images\.npy: its shape is \(30, 16, 16, 3\)"):
        Split.read("test", info=DatasetInfo.read(folder), device=CPU, folder=folder)


def test_a_damaged_dataset_json_is_reported(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"dataset": "digits"}))
    with pytest.raises(UserError, match=r"dataset\.json: damaged \(class_names: Field required\)"):
        DatasetInfo.read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": {"train": 3}},
        {"counts": {}},
        {"mean": [None] * 3},
        {"mean": [0.1]},
        {"class_names": "ab"},
        {"test_duplicates": [10**6]},
    ],
)
def test_a_dataset_json_with_an_impossible_value_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = write_normalized(tmp_path) / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"dataset\.json: damaged"):
        DatasetInfo.read(path.parent)


def test_labels_outside_the_classes_are_refused(tmp_path: Path) -> None:
    folder = write_normalized(tmp_path)
    np.save(folder / "test_labels.npy", np.full(30, 3))
    with pytest.raises(UserError, match=r"test_labels\.npy: found labels from 3 to 3; allowed: 0 to 2"):
        Split.read("test", info=DatasetInfo.read(folder), device=CPU, folder=folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused_with_the_available_devices() -> None:
    with pytest.raises(UserError, match=r"train\.device is cuda, .*allowed on this machine: auto, .*cpu"):
        choose_device("cuda", field="train.device")


def split_in_file(folder: Path, images: np.ndarray, *, window_bytes: int) -> Split:
    np.save(folder / "images.npy", images)
    mapped = np.load(folder / "images.npy", mmap_mode="c")
    values = {"mean": [0.0] * 3, "std": [1 / 255] * 3, "device": CPU, "window_bytes": window_bytes}
    return Split.of(mapped, np.arange(len(images)), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("block_images", [1, 3, 8])
@pytest.mark.parametrize("window_images", [1, 8, 24, 90])
def test_a_split_read_from_a_file_has_each_image_once_an_epoch_in_a_new_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_images: int, block_images: int
) -> None:
    monkeypatch.setattr(data, "BLOCK_BYTES", block_images * 32 * 32 * 3)
    images = colored_images(103)[0]
    split = split_in_file(tmp_path, images, window_bytes=window_images * 32 * 32 * 3)
    assert split.file is not None
    orders = []
    for epoch in (1, 2):
        found = batches(split, batch_size=4, epoch=epoch)
        order = torch.cat([labels for _, labels in found])
        assert (len(found), len(set(order.tolist()))) == (25, 100)
        pixels = torch.cat([floats for floats, _ in found]).permute(0, 2, 3, 1)
        torch.testing.assert_close(pixels, torch.from_numpy(images)[order].float())
        orders.append(order.tolist())
    assert orders[0] != orders[1]
    assert sorted(orders[0]) != sorted(orders[1])  # each epoch leaves out other images


def test_an_epoch_read_from_a_file_can_be_resumed_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "BLOCK_BYTES", 8 * 32 * 32 * 3)
    split = split_in_file(tmp_path, colored_images(80)[0], window_bytes=16 * 32 * 32 * 3)
    values = {"batch_size": 4, "seed": 1, "epoch": 2, "augmentation": Augmentation(True, 4, 3)}
    whole, rest = (TrainingBatches(split, **values) for _ in range(2))  # type: ignore[arg-type]
    rest.position = 9
    for (images, labels), (resumed_images, resumed_labels) in zip(list(whole)[9:], rest, strict=True):
        assert torch.equal(images, resumed_images)
        assert torch.equal(labels, resumed_labels)


def test_the_length_of_blocks_fits_the_batch_size_and_the_limit() -> None:
    assert [data._block_length(6, batch_size=size) for size in (1, 4, 6, 7, 256)] == [6, 4, 6, 1, 4]


def test_a_file_truncated_during_the_training_is_reported(tmp_path: Path) -> None:
    split = split_in_file(tmp_path, colored_images(50)[0], window_bytes=1)
    os.truncate(tmp_path / "images.npy", 10_000)
    with pytest.raises(UserError, match=r"images.npy: became shorter while it was read"):
        split.pixels(40, 50)


def test_evaluation_batches_are_the_same_from_a_file_and_from_memory(tmp_path: Path) -> None:
    images = colored_images(50)[0]
    in_file, resident = split_in_file(tmp_path, images, window_bytes=1), split_of(images)
    found = zip(evaluation_batches(in_file, batch_size=7), evaluation_batches(resident, batch_size=7), strict=True)
    assert all(torch.equal(one, other) and torch.equal(a, b) for (one, a), (other, b) in found)


def test_the_slices_of_several_processes_make_up_the_batch() -> None:
    split, augmentation = split_of(colored_images(24)[0]), Augmentation(True, 4, 3)
    values = {"batch_size": 6, "seed": 1, "epoch": 2, "augmentation": augmentation}
    slices_by_rank = [list(TrainingBatches(split, **values, rank=rank, processes=3)) for rank in range(3)]  # type: ignore[arg-type]
    for whole, *slices in zip(TrainingBatches(split, **values), *slices_by_rank, strict=True):  # type: ignore[arg-type]
        assert torch.equal(torch.cat([images for images, _ in slices]), whole[0])
        assert torch.equal(torch.cat([labels for _, labels in slices]), whole[1])

"""Download: bring the raw data into `artifacts/download/`, checked, whole, and the same bytes on any machine.

digits gives `images.npy` and `labels.npy`, cifar10 `cifar-10-python.tar.gz`, imagefolder `images.tar`; each with a
`source.json` that says which it is. Nothing from an archive is unpacked or unpickled here.
"""

import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.artifacts import (
    CIFAR10_ARCHIVE,
    DOWNLOAD,
    IMAGEFOLDER_ARCHIVE,
    copy_file,
    expand,
    replace_folder,
    write_array,
    write_json,
)
from pipeline.core.errors import UserError, printable, report_errors
from pipeline.core.progress import in_bytes
from pipeline.core.project import copy_hint
from pipeline.datasets.archives import DamagedArchive, members, open_tar
from pipeline.datasets.fetch import find_archive
from pipeline.datasets.imagefolder import HIDDEN, UNDECODABLE, Scan, describe, pack, scan
from pipeline.params import DownloadParams, load_params


def download(params: DownloadParams, *, folder: Path = DOWNLOAD) -> None:
    """Bring the raw data of `params.dataset` into `folder`, which afterwards holds nothing else.

    Until the new data is whole and checked, what the folder held stays as it was. Raises UserError where the
    parameters, the archive or the images are at fault, TemporaryError where the network is.
    """
    md5: dict[str, str] = {}
    with replace_folder(folder, known=md5) as fresh:
        match params.dataset:
            case "digits":
                _download_digits(fresh)
            case "cifar10":
                md5[CIFAR10_ARCHIVE] = _download_cifar10(params, fresh)
            case "imagefolder":
                _download_imagefolder(params, fresh)


def _download_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits  # noqa: PLC0415  # takes seconds, and this dataset alone needs it

    digits = load_digits()
    images, labels = digits.images, digits.target
    write_array(folder / "images.npy", [images], shape=images.shape, dtype=np.uint8)
    write_array(folder / "labels.npy", [labels], shape=labels.shape, dtype=np.int64)
    write_json(folder / "source.json", {"dataset": "digits"})
    print(f"digits: {len(images):,} images of 8x8 pixels from scikit-learn")


def _download_cifar10(params: DownloadParams, folder: Path) -> str:
    """Returns the MD5 of the archive as it was written."""
    archive = find_archive(params)
    with ThreadPoolExecutor(1) as pool:
        copied = pool.submit(copy_file, archive, folder / CIFAR10_ARCHIVE)
        count = _check_members(archive)
    write_json(folder / "source.json", {"dataset": "cifar10"})
    size = in_bytes(archive.stat().st_size)
    print(f"cifar10: {CIFAR10_ARCHIVE}, {size}, {count} members, MD5 {params.md5} as expected")
    return copied.result()


def _check_members(archive: Path) -> int:
    """Read the names in the archive, nothing else; returns how many there are.

    Raises UserError where it is no tar archive, or one has a member that could be written outside the folder it is
    unpacked in.
    """
    count = 0
    try:
        with open_tar(archive, "r") as tar:
            for member in members(tar):
                count += 1
                _check_member(archive, member)
    except DamagedArchive as error:
        raise UserError(
            f"{archive}: not a whole tar archive ({error}), although its MD5 is download.md5; "
            "set download.urls and download.md5 to an archive in CIFAR-10's layout"
        ) from None
    return count


def _check_member(archive: Path, member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name)
    problems = {
        "an absolute path": name.is_absolute(),
        "a path outside the archive's folder": ".." in name.parts,
        "a link": member.islnk() or member.issym(),
        "a device": member.isdev(),
        "of an unknown kind": not (member.isfile() or member.isdir()),
    }
    wrong = next((problem for problem, present in problems.items() if present), None)
    if wrong:
        raise UserError(
            f"{archive}: member {member.name!r} is {wrong}; allowed: files and folders inside its own folder; "
            "set download.urls and download.md5 to an archive that can be trusted"
        )


def _download_imagefolder(params: DownloadParams, folder: Path) -> None:
    found = _scan(expand(params.folder))
    size = pack(found, folder / IMAGEFOLDER_ARCHIVE)
    not_used = {reason: number for reason, number in found.not_used.items() if reason != HIDDEN}  # they come and go
    source = {
        "dataset": "imagefolder",
        "class_names": found.class_names,
        "counts": found.counts,
        "ignored_files": found.ignored,
        "undecodable_files": [{"file": name, "reason": reason} for name, reason in found.undecodable],
        "files": {"found": found.total + sum(not_used.values()), "used": found.total, "not_used": not_used},
    }
    write_json(folder / "source.json", source)
    splits = ", ".join(f"{split} {sum(counts.values()):,}" for split, counts in found.counts.items())
    print(f"imagefolder: {found.total:,} images of {len(found.class_names)} classes ({splits}), {in_bytes(size)}")
    for line in describe(found):
        print(f"imagefolder: {printable(line)}")
    if found.not_used.get(UNDECODABLE):
        print("imagefolder: those that cannot be decoded count as unreadable in normalize.max_unreadable_fraction")


def _scan(folder: Path) -> Scan:
    try:
        return scan(folder)
    except UserError as error:
        raise UserError(f"{error}{copy_hint(folder)}") from None


def main() -> None:
    """Run the step on `params.yaml`."""
    with report_errors():
        download(load_params().download)


if __name__ == "__main__":
    main()

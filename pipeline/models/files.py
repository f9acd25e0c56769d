"""Save and load the files of a model: `<checkpoint>.safetensors` with the weights, and `model.json`."""

from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from pipeline.artifacts import missing_file_message, read_json, write_bytes, write_json
from pipeline.core.errors import UserError, first_line
from pipeline.models.build import Classifier, build
from pipeline.models.config import ModelConfig


def save_weights(classifier: nn.Module, path: Path) -> None:
    """Write the weights as safetensors; the same weights give the same bytes."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    write_bytes(path, save(weights))


def save_config(config: ModelConfig, folder: Path) -> None:
    """Write `model.json` into the folder."""
    write_json(folder / "model.json", config.model_dump(mode="json"))


def load_config(folder: Path) -> ModelConfig:
    """Return the content of `model.json`; raises UserError where it is missing or damaged."""
    path = folder / "model.json"
    try:
        return ModelConfig.model_validate(read_json(path))
    except ValidationError as error:
        raise UserError(
            f"{path}: damaged ({error.errors()[0]['msg']}); `dvc repro train --force` makes it again"
        ) from None


def load_model(folder: Path, *, checkpoint: str = "best") -> tuple[Classifier, ModelConfig]:
    """Return the network of `<checkpoint>.safetensors` and `model.json`, in evaluation mode, on the CPU.

    Raises UserError where a file is missing or damaged.
    """
    config = load_config(folder)
    classifier = build(config)
    weights = folder / f"{checkpoint}.safetensors"
    try:
        classifier.load_state_dict(load(weights.read_bytes()))
    except FileNotFoundError:
        raise UserError(missing_file_message(weights)) from None
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{weights}: damaged, or not weights of {config.model} ({first_line(error)}); "
            "`dvc repro train --force` makes it again"
        ) from None
    return classifier.eval(), config

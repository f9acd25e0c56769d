"""What MLflow loads and serves: the recorded weights behind `predict` (see model_code.py for how it gets there)."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

from pipeline.artifacts import Images
from pipeline.core.errors import UserError
from pipeline.models.cpu_kernels import use_cpu_kernels
from pipeline.models.files import load_config, load_model
from pipeline.models.inference import class_probabilities

MAX_PIXEL = 255


class InvalidImages(MlflowException):
    """An input that is no batch of images; a server answers with status 400 and the message alone."""

    def __init__(self, found: str, *, shape: tuple[int, int, int]) -> None:
        size = ", ".join(map(str, shape))
        super().__init__(
            f"inputs: found {found}; allowed: images as they were decoded, (N, {size}), of whole numbers from 0 to "
            f"{MAX_PIXEL}; the model itself scales and normalizes them",
            error_code=INVALID_PARAMETER_VALUE,
        )

    @property
    def message(self) -> str:
        return str(self.args[0])

    @message.setter
    def message(self, value: str) -> None:
        """Ignore what MLflow's server sets: it puts the whole input before the message."""


class ServedModel(PythonModel):
    """Images (N, H, W, C) of whole numbers from 0 to 255 → a table: `predicted_class`, and a column a class.

    They may come as an array, as nested lists, or in the one column of a DataFrame. Raises InvalidImages.
    """

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["weights"]).parent
        try:
            use_cpu_kernels(load_config(folder).cpu_kernels, field="model.json: cpu_kernels")
        except UserError as error:  # an application that already uses PyTorch is served all the same
            logging.getLogger(__name__).warning("%s", error)
        self.network, self.config = load_model(folder)

    # MLflow reads the hints at run time: this one, without type arguments, tells it to leave the input as it is
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        size = self.config.image_size
        images = as_images(model_input, shape=(size, size, self.config.channels))
        probabilities = class_probabilities(self.network, images, config=self.config)
        names = list(self.config.class_names)
        table = pd.DataFrame(probabilities.astype(np.float64), columns=names)
        table.insert(0, "predicted_class", [names[index] for index in probabilities.argmax(1)])
        return table


def as_images(found: object, *, shape: tuple[int, int, int]) -> Images:
    """Return the images (N, H, W, C) uint8 of an input; raises InvalidImages saying what is wrong with it.

    Nothing is rounded, wrapped or cut: images scaled to 0 to 1 would all become black.
    """
    values = _array(found, shape=shape)
    if not len(values):
        raise InvalidImages("no image", shape=shape)
    if values.shape[1:] != shape:
        raise InvalidImages(f"an array of shape {values.shape}", shape=shape)
    wrong = ~((values >= 0) & (values <= MAX_PIXEL))
    if values.dtype.kind == "f":
        wrong |= values != np.floor(values)
    if wrong.any():
        image, row, column, channel = (int(index[0]) for index in wrong.nonzero())
        where = f"image {image}, row {row}, column {column}, channel {channel}"
        raise InvalidImages(f"the value {values[wrong][0]} ({where})", shape=shape)
    return values.astype(np.uint8)


def _array(found: object, *, shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Return an array of numbers, of any shape with a first axis."""
    if isinstance(found, pd.DataFrame):
        if len(found.columns) != 1:
            raise InvalidImages(f"a table of {len(found.columns)} columns instead of one", shape=shape)
        found = found.iloc[:, 0]
    if isinstance(found, pd.Series):
        found = [_cell(row, shape=shape) for row in found]
    if isinstance(found, dict):
        raise InvalidImages(f"named inputs {', '.join(map(repr, found))} instead of one array", shape=shape)
    try:
        values = np.asarray(found)
    except ValueError:
        raise InvalidImages("images or rows of different lengths", shape=shape) from None
    if values.dtype.kind == "O":
        values = _numbers(values, shape=shape)
    if values.dtype.kind not in "iuf":
        raise InvalidImages(f"{_kind(values)} instead of numbers", shape=shape)
    if not values.ndim:
        raise InvalidImages(f"the single number {values}", shape=shape)
    return values


def _cell(row: Any, *, shape: tuple[int, int, int]) -> Any:
    """Return an image of a table; MLflow has tensors in a column as flat lists."""
    try:
        values = np.asarray(row)
    except ValueError:  # ragged
        return row
    return values.reshape(shape) if values.shape == (np.prod(shape),) else values


def _numbers(values: np.ndarray[Any, Any], *, shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Return what NumPy has no type for, such as integers of more than 64 bits or null, as float64."""
    for value in values.flat:
        if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
            raise InvalidImages(f"{'null' if value is None else type(value).__name__} among the values", shape=shape)
    try:
        return values.astype(np.float64)
    except OverflowError:
        raise InvalidImages("a value beyond all floating-point numbers", shape=shape) from None


def _kind(values: np.ndarray[Any, Any]) -> str:
    names = {"U": "text", "S": "bytes", "b": "true and false", "c": "complex numbers", "M": "dates"}
    return names.get(values.dtype.kind, f"values of type {values.dtype}")

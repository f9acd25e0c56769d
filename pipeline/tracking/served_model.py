"""The model that MLflow loads and serves: recorded weights with a `predict` method.

A copy of this module is recorded with each model; see model_code.py.
"""

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
from pipeline.models.config import UNKNOWN, ModelConfig
from pipeline.models.cpu_kernels import use_cpu_kernels
from pipeline.models.files import load_config, load_model
from pipeline.models.inference import class_probabilities

MAX_PIXEL = 255
IS_UNKNOWN = "is_unknown"  # the last column of an answer with `coverage`


class InvalidRequest(MlflowException):
    """The error for a request that cannot be answered; a server answers with status 400 and only the message."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        return str(self.args[0])

    @message.setter
    def message(self, value: str) -> None:
        """Ignore the message that MLflow's server sets, which has the whole input before ours."""


class InvalidImages(InvalidRequest):
    """The error for input that is not a batch of images."""

    def __init__(self, found: str, *, shape: tuple[int, int, int]) -> None:
        size = ", ".join(map(str, shape))
        super().__init__(
            f"inputs: found {found}; allowed: images as they were decoded, (N, {size}), of whole numbers from 0 to "
            f"{MAX_PIXEL}; the model itself scales and normalizes them"
        )


class ServedModel(PythonModel):
    """A model that predicts the classes of images (N, H, W, C) of whole numbers from 0 to 255.

    The images may be an array, nested lists, or the only column of a DataFrame. The result is a table with the column
    `predicted_class` and a column of probabilities for each class. With the parameter `coverage`, the predicted class
    is UNKNOWN where its probability is below the threshold of the model for this coverage, and a last column
    IS_UNKNOWN has true there, since a data set may have a class of that name. Raises InvalidRequest.
    """

    def load_context(self, context: Any) -> None:
        """Load the recorded weights and configuration; MLflow calls this once, before `predict`."""
        folder = Path(context.artifacts["weights"]).parent
        try:
            use_cpu_kernels(load_config(folder).cpu_kernels, field="model.json: cpu_kernels")
        except UserError as error:  # the program uses PyTorch with other kernels already: only the last bits differ
            logging.getLogger(__name__).warning("%s", error)
        self.network, self.config = load_model(folder)

    # MLflow reads the type hints at run time; `np.ndarray` without type arguments makes it pass the input unchanged
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        """Return the table of predicted classes and probabilities for the images in `model_input`."""
        threshold = find_threshold(self.config, (params or {}).get("coverage"))
        size = self.config.image_size
        images = as_images(model_input, shape=(size, size, self.config.channels))
        probabilities = class_probabilities(self.network, images, config=self.config)
        names = list(self.config.class_names)
        table = pd.DataFrame(probabilities.astype(np.float64), columns=names)
        table.insert(0, "predicted_class", [names[index] for index in probabilities.argmax(1)])
        if threshold is not None:
            is_unknown = probabilities.max(1) < threshold
            table["predicted_class"] = table["predicted_class"].mask(is_unknown, UNKNOWN)
            table[IS_UNKNOWN] = is_unknown
        return table


def find_threshold(config: ModelConfig, coverage: float | None) -> float | None:
    """Return the threshold of a model for a coverage, or None without a coverage.

    Raises InvalidRequest where the model has no such threshold, or a class has the name of the column IS_UNKNOWN.
    """
    if coverage is None:
        return None
    if IS_UNKNOWN in config.class_names:
        raise InvalidRequest(
            f"params: coverage is {coverage}, but a class has the name of the column {IS_UNKNOWN}, which the answer "
            "would have; leave coverage out, or rename the class and train the model again"
        )
    try:
        return config.threshold(coverage)
    except ValueError as error:
        raise InvalidRequest(f"params: {error}") from None


def as_images(found: object, *, shape: tuple[int, int, int]) -> Images:
    """Return the input as images (N, H, W, C) uint8; raise InvalidImages where it is something else.

    Values are not rounded or clipped: images that were scaled to 0 to 1 would become black.
    """
    values = _array(found, shape=shape)
    if not len(values):
        raise InvalidImages("no image", shape=shape)
    if values.ndim == 3 and values.shape[2] == shape[2]:
        raise InvalidImages(f"one image of shape {values.shape}, without a batch axis: send it as [image]", shape=shape)
    if values.shape[1:] != shape:
        raise InvalidImages(f"an array of shape {values.shape}", shape=shape)
    is_invalid = ~((values >= 0) & (values <= MAX_PIXEL))
    if values.dtype.kind == "f":
        is_invalid |= values != np.floor(values)
    if is_invalid.any():
        image, row, column, channel = (int(index[0]) for index in is_invalid.nonzero())
        where = f"image {image}, row {row}, column {column}, channel {channel}"
        raise InvalidImages(f"the value {values[is_invalid][0]} ({where})", shape=shape)
    return values.astype(np.uint8)


def _array(found: object, *, shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Return the input as an array of numbers with at least one axis; raise InvalidImages where that is impossible."""
    if isinstance(found, pd.DataFrame):
        if len(found.columns) != 1:
            raise InvalidImages(f"a table of {len(found.columns)} columns instead of one", shape=shape)
        found = found.iloc[:, 0]
    if isinstance(found, pd.Series):
        found = [_image_of_cell(cell, shape=shape) for cell in found]
    if isinstance(found, dict):
        raise InvalidImages(f"named inputs {', '.join(map(repr, found))} instead of one array", shape=shape)
    try:
        values = np.asarray(found)
    except ValueError:
        raise InvalidImages("images or rows of different lengths", shape=shape) from None
    if values.dtype.kind == "O":
        values = _as_float64(values, shape=shape)
    if values.dtype.kind not in "iuf":
        raise InvalidImages(f"{_describe_type(values)} instead of numbers", shape=shape)
    if not values.ndim:
        raise InvalidImages(f"the single number {values}", shape=shape)
    return values


def _image_of_cell(cell: Any, *, shape: tuple[int, int, int]) -> Any:
    """Return the image in a cell of a table, where MLflow has tensors as flat lists."""
    try:
        values = np.asarray(cell)
    except ValueError:  # rows of different lengths
        return cell
    return values.reshape(shape) if values.shape == (np.prod(shape),) else values


def _as_float64(values: np.ndarray[Any, Any], *, shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Return an array of Python objects, such as integers of more than 64 bits, as float64.

    Raises InvalidImages where an object is not a number.
    """
    for value in values.flat:
        if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
            raise InvalidImages(f"{'null' if value is None else type(value).__name__} among the values", shape=shape)
    try:
        return values.astype(np.float64)
    except OverflowError:
        raise InvalidImages("a value beyond all floating-point numbers", shape=shape) from None


def _describe_type(values: np.ndarray[Any, Any]) -> str:
    """Return what the values are, for the message."""
    names = {"U": "text", "S": "bytes", "b": "true and false", "c": "complex numbers", "M": "dates"}
    return names.get(values.dtype.kind, f"values of type {values.dtype}")

"""What MLflow loads and serves: the recorded weights behind `predict`; MLflow runs this file (model from code)."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from pipeline.model import class_probabilities, load_model


class ServedModel(PythonModel):
    """Images (N, H, W, C) uint8 → a table: `predicted_class`, and a column of probabilities a class."""

    def load_context(self, context: Any) -> None:
        self.network, self.config = load_model(Path(context.artifacts["weights"]).parent)

    # MLflow reads the hints at run time: this one, without type arguments, tells it to leave the input as it is
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        images = np.asarray(model_input, dtype=np.uint8)
        probabilities = class_probabilities(self.network, images, config=self.config)
        names = list(self.config.class_names)
        table = pd.DataFrame(probabilities.astype(np.float64), columns=names)
        table.insert(0, "predicted_class", [names[index] for index in probabilities.argmax(1)])
        return table


set_model(ServedModel())

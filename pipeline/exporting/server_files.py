"""Write the files with which Triton Inference Server and KServe serve an ONNX file, and those that any user needs."""

import json
import re
from pathlib import Path

from pipeline.artifacts import write_text
from pipeline.core.errors import UserError, escape_control_chars
from pipeline.exporting.formats import INPUT, OUTPUT
from pipeline.models.config import ModelConfig

LABELS = "labels.txt"
PREPROCESS = "preprocess.py"
KSERVE = "inferenceservice.yaml"
MAX_BATCH_SIZE = 64  # the largest batch that is verified
MAX_QUEUE_DELAY_MICROSECONDS = 1000
TRITON_VERSION = "25.03-py3"  # has ONNX Runtime 1.20; 1.18 is the first that reads version 10 of the file format
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # of RFC 1035, as Kubernetes wants it

_TRITON = """\
# Triton Inference Server: tritonserver --model-repository=<the folder above this one>
name: "{name}"
platform: "onnxruntime_onnx"
max_batch_size: {max_batch_size}
input [
  {{
    name: "{input}"
    data_type: TYPE_UINT8
    dims: [ {size}, {size}, {channels} ]
  }}
]
output [
  {{
    name: "{output}"
    data_type: TYPE_FP32
    dims: [ {num_classes} ]
    label_filename: "{labels}"
  }}
]
dynamic_batching {{
  max_queue_delay_microseconds: {delay}
}}
"""

_SERVICE = """\
# for KServe 0.12 or later and its runtime kserve-tritonserver: kubectl apply -f {file}
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
spec:
  predictor:
    model:
      runtime: kserve-tritonserver
      runtimeVersion: {version} # the tag of Triton's image
      modelFormat:
        name: triton
        version: "2"
      protocolVersion: v2
      storageUri: pvc://CLAIM/FOLDER # change it: where this folder, which contains {name}/, was copied to
"""


def check_name(name: str) -> None:
    """Raise UserError where Kubernetes would refuse the name of a model."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name is {name!r}; allowed: up to 63 small letters of English, digits and hyphens, beginning with a "
            "letter and ending without a hyphen"
        )


def default_name(config: ModelConfig) -> str:
    """Return the name of the network in the form that `check_name` allows."""
    name = re.sub("[^a-z0-9]+", "-", config.model.rpartition("/")[2].lower()).strip("-")[:63].rstrip("-")
    return name if _NAME.fullmatch(name) else "classifier"


def write_server_files(folder: Path, *, name: str, config: ModelConfig) -> None:
    """Write the configuration of the model in Triton's repository of models, and the service of KServe."""
    triton = _TRITON.format(
        name=name,
        max_batch_size=MAX_BATCH_SIZE,
        input=INPUT,
        output=OUTPUT,
        size=config.image_size,
        channels=config.channels,
        num_classes=len(config.class_names),
        labels=LABELS,
        delay=MAX_QUEUE_DELAY_MICROSECONDS,
    )
    write_text(folder / name / "config.pbtxt", triton)
    write_text(folder / KSERVE, _SERVICE.format(file=KSERVE, name=name, version=TRITON_VERSION))


def write_labels(folder: Path, *, config: ModelConfig) -> None:
    """Write the names of the classes, one a line in the order of the probabilities; control characters are escaped."""
    write_text(folder / LABELS, "".join(f"{escape_control_chars(name)}\n" for name in config.class_names))


def write_preprocessing(folder: Path, *, config: ModelConfig, model: Path, labels: Path) -> None:
    """Write `preprocess.py` with the numbers of the model, and the paths in the folder of its file and its labels."""
    text = Path(__file__).with_name(PREPROCESS).read_text(encoding="utf-8")
    values = {
        "IMAGE_SIZE": config.image_size,
        "CHANNELS": config.channels,
        "RESIZE": config.resize,
        "MODEL": model.relative_to(folder).as_posix(),
        "LABELS": labels.relative_to(folder).as_posix(),
    }
    for constant, value in values.items():
        text, count = re.subn(rf"(?m)^{constant} = .*$", f"{constant} = {json.dumps(value)}", text)
        assert count == 1, constant
    write_text(folder / PREPROCESS, text)

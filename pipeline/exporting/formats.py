"""Write a network as ONNX or as a program of PyTorch, and run such a file."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import nn

from pipeline.artifacts import Images
from pipeline.core.errors import UserError, first_line
from pipeline.models.config import ModelConfig

Format = Literal["onnx", "torch"]
FORMATS: tuple[Format, ...] = get_args(Format)
INPUT, OUTPUT = "images", "probabilities"
FILE_NAMES: dict[Format, str] = {"onnx": "model.onnx", "torch": "model.pt2"}
ONNX_OPSET = 18  # the first with antialiased resizes
EXAMPLE_BATCH = 2  # images that are traced; a batch of one would make the size of the batch a constant
ERRORS_ONLY = 3  # of ONNX Runtime's levels of severity

Run = Callable[[Images], npt.NDArray[Any]]  # (N, H, W, C) to (N, num_classes)


def write(network: nn.Module, path: Path, *, to: Format, config: ModelConfig) -> None:
    """Write a network for any number of images (N, H, W, C) uint8 to a file; it must be in evaluation mode.

    Its parameters need no gradients afterwards, nor does the output of the written program. Raises UserError where the
    network cannot be exported. Neither file contains paths of this machine.
    """
    shape = (EXAMPLE_BATCH, config.image_size, config.image_size, config.channels)
    with _explain_failure(to, config=config), _quiet():
        dynamic = ({0: torch.export.Dim("batch", min=1)},)
        images = torch.zeros(shape, dtype=torch.uint8)
        program = torch.export.export(network.requires_grad_(False), (images,), dynamic_shapes=dynamic)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it has the paths of the source files
        if to == "torch":
            torch.export.save(program, path)
        else:
            _write_onnx(program, path, dynamic_shapes=dynamic)


def _write_onnx(program: torch.export.ExportedProgram, path: Path, *, dynamic_shapes: Any) -> None:
    written = torch.onnx.export(
        program,
        (),
        None,
        dynamo=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=dynamic_shapes,
        opset_version=ONNX_OPSET,
        verbose=False,
    )
    assert written is not None
    written.save(path)


def open_export(path: Path, *, threads: int) -> Run:
    """Return the function that runs a written file on the CPU; the number of threads is that of ONNX Runtime alone."""
    return _open_onnx(path, threads=threads) if path.suffix == ".onnx" else _open_torch(path)


def _open_onnx(path: Path, *, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = ERRORS_ONLY
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Images) -> npt.NDArray[np.float32]:
        [probabilities] = session.run([OUTPUT], {INPUT: images})
        return np.asarray(probabilities)

    return run


def _open_torch(path: Path) -> Run:
    with _quiet():
        network = torch.export.load(path).module()

    def run(images: Images) -> npt.NDArray[np.float32]:
        probabilities: npt.NDArray[np.float32] = network(torch.from_numpy(images)).numpy()
        return probabilities

    return run


@contextmanager
def _explain_failure(to: Format, *, config: ModelConfig) -> Iterator[None]:
    """Raise UserError where the block, which exports a network, fails."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    # the exporters raise nearly anything: errors of their own, of TorchDynamo, RuntimeError, TypeError, …
    except Exception as error:
        raise UserError(
            f"--to {to}: {config.model} cannot be exported ({first_line(error)}); allowed: a network without decisions "
            "that depend on the pixels; train another one, or serve this one with `make serve`"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what the exporters print, warn and log in the block."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        yield

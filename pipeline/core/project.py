"""Find the project that a process works for: its folder has the MLflow store, MLflow's artifacts and the cache.

It may differ from the current folder: a flow run trains in a clone of the project, and `dvc exp run --temp` and
`--queue` train in a copy that DVC deletes.
"""

from pathlib import Path

from pipeline.core.settings import get_settings

DVC_TEMPORARY_FOLDERS = Path(".dvc/tmp/exps")  # DVC creates the temporary copies of a project there


def project_folder() -> Path:
    """Return the absolute path of the project that the current folder is a clone or temporary copy of, or is itself.

    PIPELINE_PROJECT names the project in a flow run's clone, DVC_ROOT in a temporary copy of DVC.
    """
    if project := get_settings().project:
        return Path(project).resolve()
    return temporary_folder_owner() or Path.cwd().resolve()


def temporary_folder_owner() -> Path | None:
    """Return the project of which the current folder is a temporary copy of DVC, or None where it is not such a copy.

    DVC_ROOT alone is not enough: DVC sets it in all stages, and a project inside a stage of another one inherits it.
    """
    root = get_settings().dvc_root
    if root and Path.cwd().resolve().is_relative_to((Path(root) / DVC_TEMPORARY_FOLDERS).resolve()):
        return Path(root).resolve()
    return None


def artifact_folder(project: Path) -> Path:
    """Return the folder of MLflow's artifacts, where the store is not a server."""
    return project / "mlartifacts"


def pipeline_cache_folder(project: Path) -> Path:
    """Return the folder for checkpoints and other files that outlive a stage: `.cache/`, or PIPELINE_CACHE_DIR."""
    return project / get_settings().cache_dir


def copy_hint(path: Path) -> str:
    """Return a hint for the message about a missing file; empty unless the folder is a temporary copy of DVC."""
    if path.is_absolute() or temporary_folder_owner() is None:
        return ""
    return (
        f"; this folder is a temporary copy, into which DVC copies only files that git tracks: add "
        f"`--copy-paths {path}` to `dvc exp run`, or set an absolute path"
    )

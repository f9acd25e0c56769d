"""The errors for a folder of images that is missing or whose layout is not allowed."""

from pathlib import Path

from pipeline.core.errors import UserError

ALLOWED_LAYOUTS = (
    "<class>/… or <split>/<class>/… with at least two classes, split being train (training), validation (val, valid, "
    "dev) or test (testing, holdout, eval), with words before or after it as in seg_train; or a table labels.csv"
)


def layout_error(found: str, remedy: str) -> UserError:
    """Return the error for a folder in `download.folder` that is missing or whose layout is not allowed."""
    return UserError(f"download.folder: {found}; allowed: {ALLOWED_LAYOUTS}; {remedy}")


def check_is_folder(folder: Path) -> None:
    """Raise UserError where the folder in `download.folder` does not exist or is a file."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise layout_error(f"{str(folder)!r} {problem}", "correct the path")

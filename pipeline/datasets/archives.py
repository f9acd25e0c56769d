"""Read tar archives that others made, without extracting their files into a folder."""

import gzip
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.artifacts import add_path_to_errors, missing_file_message
from pipeline.core.errors import UserError, first_line
from pipeline.datasets.source import DOWNLOAD_AGAIN

MAX_HEADER_BYTES = 2**20
MAX_MEMBER_BYTES = 2**28  # of a file that `read_member` reads; the batches of CIFAR-10 have 31 MB
MAX_UNPACKED_BYTES = 2**30  # of a compressed archive after decompression; CIFAR-10's has 186 MB
_HEADER_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class DamagedArchive(ValueError):  # noqa: N818
    """The error for an archive, or a file in it, that cannot be read; its text is the reason, in one line."""


class _TarInfo(tarfile.TarInfo):
    """A header of a tar archive whose size is checked before it is used.

    Where a size is negative, Python before 3.11.14 reads the same headers in an endless loop. Headers of extra data (a
    long name, pax) are read into memory by every version, whatever their size.
    """

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.InvalidHeaderError("a negative size")  # type: ignore[attr-defined]
        if self.type in _HEADER_TYPES and count > MAX_HEADER_BYTES:
            raise tarfile.InvalidHeaderError(f"a header of {count:,} bytes")  # type: ignore[attr-defined]
        size: int = super()._block(count)  # type: ignore[misc]
        return size


@contextmanager
def report_damage(archive: Path) -> Iterator[None]:
    """Turn the error for a missing or damaged archive into a UserError that names the step to run again."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(missing_file_message(archive)) from None
    except DamagedArchive as error:
        raise UserError(f"{archive}: damaged ({error}); {DOWNLOAD_AGAIN}") from None


def open_tar(path: Path, mode: Any) -> tarfile.TarFile:
    """Open an archive; raises DamagedArchive where the file is not one, OSError where there is no such file."""
    try:
        return tarfile.open(path, mode, tarinfo=_TarInfo)
    except Exception as error:
        raise _damaged(error) from None


def open_compressed_tar(path: Path) -> tarfile.TarFile:
    """Decompress a .tar.gz into a temporary file without a name, and open that.

    In the .tar.gz itself, each search for a file would start at the beginning: normalize takes 8.8 s instead of 11.6 s
    for CIFAR-10. Raises DamagedArchive where the file is not such an archive or has more than MAX_UNPACKED_BYTES,
    OSError where there is no such file.
    """
    unpacked = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # must stay open as long as the archive
    try:
        with gzip.open(path) as file:
            while block := file.read(2**20):
                with add_path_to_errors(path.parent):  # an error with a path, as of a full disk, is not DamagedArchive
                    unpacked.write(block)
                if unpacked.tell() > MAX_UNPACKED_BYTES:
                    raise DamagedArchive(f"unpacked more than {MAX_UNPACKED_BYTES:,} bytes")
        unpacked.seek(0)
        return tarfile.open(fileobj=unpacked, mode="r:", tarinfo=_TarInfo)
    except Exception as error:
        unpacked.close()
        raise _damaged(error) from None


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of all members, one in memory at a time; raises DamagedArchive."""
    while (member := _next_member(tar)) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile collects all headers: 1 KB for each file
        yield member


def _next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except Exception as error:
        raise _damaged(error) from None


def read_member(tar: tarfile.TarFile, name: str) -> bytes:
    """Return the content of a file in the archive.

    Raises KeyError where there is no such file, DamagedArchive where it is damaged or larger than MAX_MEMBER_BYTES.
    """
    try:
        member = tar.getmember(name)
        if member.size > MAX_MEMBER_BYTES:
            raise DamagedArchive(f"{name} has {member.size:,} bytes; allowed: {MAX_MEMBER_BYTES:,}")
        file = tar.extractfile(member) if member.isreg() else None
        return file.read() if file else b""
    except KeyError:
        raise
    except Exception as error:
        raise _damaged(error) from None


def check_members(archive: Path) -> int:
    """Check the headers of a downloaded archive, and return the number of its members; no content is read.

    Raises UserError where the file is not a complete tar archive, or has a member that could be written outside the
    folder into which somebody extracts it.
    """
    count = 0
    try:
        with open_tar(archive, "r") as tar:
            for member in members(tar):
                count += 1
                _check_member(archive, member)
    except DamagedArchive as error:
        raise UserError(
            f"{archive}: not a complete tar archive ({error}), although its MD5 is download.md5; "
            "set download.urls and download.md5 to a complete one"
        ) from None
    return count


def _check_member(archive: Path, member: tarfile.TarInfo) -> None:
    """Raise UserError unless the member is a file or folder inside the archive's own folder."""
    name = PurePosixPath(member.name)
    problems = {
        "an absolute path": name.is_absolute(),
        "a path outside the archive's folder": ".." in name.parts,
        "a link": member.islnk() or member.issym(),
        "a device": member.isdev(),
        "of an unknown kind": not (member.isfile() or member.isdir()),
    }
    wrong = next((problem for problem, present in problems.items() if present), None)
    if wrong:
        raise UserError(
            f"{archive}: member {member.name!r} is {wrong}; allowed: files and folders inside its own folder; "
            "set download.urls and download.md5 to an archive that can be trusted"
        )


def _damaged(error: Exception) -> Exception:
    """Return DamagedArchive in place of an error that tarfile or zlib raised: they raise nearly anything.

    An error of the file system, which names a file, is returned unchanged.
    """
    if isinstance(error, DamagedArchive) or (isinstance(error, OSError) and error.filename is not None):
        return error
    return DamagedArchive(first_line(error))

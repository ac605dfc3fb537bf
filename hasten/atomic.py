"""Files that are either the old one or the complete new one, never a torn one.

Write aside in the same folder, fsync, rename over the target, fsync the folder. A run killed at any
moment leaves at most one hidden `.hasten-*.part*` file, which nothing reads.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hasten.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
# Some network filesystems cannot sync a folder; the rename itself is done by then.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF}


def atomic_write(path: Path | str, data: bytes | str) -> Path:
    """Make `path` hold exactly `data` (text as UTF-8, newlines as given); returns the path.

    Raises `OutputError` when it cannot; then an older file at `path` is untouched and no part is left.
    """
    payload = data.encode("utf-8") if isinstance(data, str) else data
    with replacing(path) as aside:
        aside.write_bytes(payload)
    return Path(path)


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`, with the same suffix; on success it becomes `path`.

    The file exists and is empty when the body starts. Any exception in the body removes it and leaves an
    older `path` as it was. Operating-system errors about the temporary file (full disk, read-only folder)
    are raised as `OutputError` with the fix; other exceptions pass through unchanged.
    A link at `path` is followed, so that the file it points to is replaced rather than the link.
    """
    target = Path(os.path.realpath(path))
    aside = target.parent / f".hasten-{secrets.token_hex(6)}.part{target.suffix}"
    try:
        try:
            _check_target(target)
            _create(aside, target)
            yield aside
            _sync(aside)
            os.replace(aside, target)
            _sync_folder(target.parent)
        except Exception as error:
            explained = _explain(error, target, aside)
            if explained is None:
                raise
            raise explained from error
    finally:
        with suppress(OSError):  # a folder that vanished or is unreachable must not hide the first error
            aside.unlink()


def _check_target(target: Path) -> None:
    """Raise `OutputError` for what a rename could not replace, or must not (a device, for example)."""
    if target.is_dir():
        raise OutputError(f"Cannot write {target}: it is a folder. Name a file inside it.")
    if target.exists() and not target.is_file():
        raise OutputError(f"Cannot write {target}: it is not a regular file. Name a new file.")
    if not target.parent.is_dir():
        problem = "is not a folder" if target.parent.exists() else "does not exist"
        raise OutputError(
            f"Cannot write {target}: {target.parent} {problem}. Create the folder first, or name another one."
        )


def _create(aside: Path, target: Path) -> None:
    """Make the empty file with the access rights of the file it will replace, or the user's default."""
    os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    if target.exists():
        os.chmod(aside, target.stat().st_mode & 0o777)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can do that (Windows cannot)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _explain(error: Exception, target: Path, aside: Path) -> OutputError | None:
    """The `OutputError` for a failed write, or None when `error` is about something else.

    Looks at `errno` rather than the class: encoders raise their own exceptions that carry one.
    """
    number = getattr(error, "errno", None)
    named = {str(getattr(error, "filename", None)), str(getattr(error, "filename2", None))}
    # An error of the body about a file of its own (an input that is missing) is not a failed output.
    ours = number in _FULL | {errno.EIO} or not named.isdisjoint({str(aside), str(target)})
    if isinstance(error, OutputError) or not ours:
        return None
    if number in _FULL:
        return OutputError(
            f"Cannot write {target}: the disk is full, or a quota or size limit is reached ({_free(target.parent)} free)."
            " Free some space or choose another folder; nothing was left behind."
        )
    if number in _DENIED:
        return OutputError(
            f"Cannot write {target}: the folder {target.parent} is not writable."
            " Choose another folder or change its permissions."
        )
    if number == errno.ENAMETOOLONG:
        return OutputError(f"Cannot write {target}: the name is too long. Choose a shorter one.")
    reason = os.strerror(number) if isinstance(number, int) else str(error)
    return OutputError(f"Cannot write {target}: {reason}. Check the disk or choose another folder.")


def _free(folder: Path) -> str:
    try:
        stats = os.statvfs(folder)
    except (OSError, AttributeError):
        return "an unknown amount"
    return f"{stats.f_bavail * stats.f_frsize / 2**20:.1f} MiB"

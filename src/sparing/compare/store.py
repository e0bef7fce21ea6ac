"""The results of a sweep on disk: one JSON object a line, never lost, never doubled.

A row is appended with one `write` of a whole line and an `fsync`, so after `append` returns the row
survives a killed process and a power cut. Only the *last* line can be torn, and only when it lacks its
newline; opening the store repairs that. Anything else that can't be read is an error, not a guess: the
file is left as it is.

    store = ResultStore("out")               # makes the folder, takes its lock
    if row_key(config) not in store.done():
        store.append({"key": row_key(config), "score": 0.97})
    store.close()                            # or `with ResultStore("out") as store:`
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from sparing.errors import InputFileError, InvalidInputError, OutputError

RESULTS_NAME = "results.jsonl"
TORN_NAME = "results.torn"
LOCK_NAME = ".sparing.lock"
KEY_DIGITS = 16

Row = dict[str, Any]


def row_key(config: dict[str, Any]) -> str:
    """A short stable hash of a configuration: the same for the same values in any order of the names.

    The share 1.0 and the token count 1 are different configurations and get different keys.
    """
    try:
        text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            "configuration of a row",
            config,
            "names with strings, finite numbers, booleans, null, lists and objects",
            f"convert the value before hashing it ({error})",
        ) from error
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:KEY_DIGITS]


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows in a folder, without a lock and without changing anything; a torn last line is skipped.

    `path` is the output folder or its `results.jsonl`. A folder without results has no rows.
    """
    file = Path(path)
    if file.is_dir() or file.suffix != ".jsonl":
        file = file / RESULTS_NAME
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputFileError(str(file), _reason(error), "check the path and its permissions") from error
    rows, _ = _parse(data, file)
    return rows


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Replace `path` by `text`: readers see the old file or the whole new one, never a part."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _refuse(target, error)


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Like `write_text_atomic`, with `obj` as indented JSON."""
    try:
        text = json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"content of {os.fspath(path)}",
            str(error),
            "values that JSON can hold",
            "convert the value first",
        ) from error
    write_text_atomic(path, text + "\n")


def read_json(path: Path) -> Any:
    """What `write_json_atomic` wrote; None if there is no file.

    Raises:
        InputFileError: it cannot be read.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputFileError(path, f"cannot be read ({error})", "delete it and run the command again") from error


class ResultStore:
    """The one writer of an output folder.

    Args:
        path: the output folder; made when it isn't there.

    Raises:
        OutputError: the folder can't be written, or another process is writing it.
        InputFileError: a line of `results.jsonl` can't be read (the file is left as it is).

    Attributes:
        file: the path of `results.jsonl`.
        repaired: what was done about a torn last line when the store was opened; None if nothing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.folder = Path(path)
        self.file = self.folder / RESULTS_NAME
        self.repaired: str | None = None
        self._rows: list[Row] = []
        self._keys: set[str] = set()
        self._size = 0
        self._descriptor = -1
        self._lock = -1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self.folder / LOCK_NAME)
            self._open()
        except OSError as error:
            self.close()
            _refuse(self.file, error)
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Read what is there, repair a torn last line, and stand at the end of the file."""
        self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        _sync_folder(self.folder)
        data = self.file.read_bytes()
        self._rows, tail = _parse(data, self.file)
        self._keys = {row["key"] for row in self._rows}
        self._size = len(data)
        if not tail:
            return
        if _is_row(tail):  # everything but the newline arrived: the row is whole
            self._write(b"\n")
            self.repaired = "the last row lacked its newline; the row is kept"
        else:
            self._set_aside(tail)
            self._size = len(data) - len(tail)
            os.ftruncate(self._descriptor, self._size)
            os.fsync(self._descriptor)
            self.repaired = f"the last row was torn ({len(tail)} bytes, moved to {TORN_NAME}); it runs again"

    def _set_aside(self, tail: bytes) -> None:
        """Keep the torn bytes in a file next to the results; they are of use to a person only."""
        with open(self.folder / TORN_NAME, "ab") as stream:
            stream.write(tail + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def append(self, row: Row) -> None:
        """Add one row, on disk when this returns; after an error the earlier rows are as they were.

        Raises:
            InvalidInputError: no string under "key", a key that is there already, or a value that isn't JSON.
            OutputError: the disk is full or fails; the row is not in the file.
        """
        if self._descriptor < 0:
            raise OutputError(str(self.file), "the store is closed", "open a new ResultStore on the folder")
        line = _line(row)
        if row["key"] in self._keys:
            raise InvalidInputError(
                "key of a row",
                row["key"],
                "a key that is not in the store",
                "ask done() before running a configuration",
            )
        try:
            self._roll_back()  # does nothing, unless an earlier failure couldn't clean up after itself
            self._write(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._roll_back()
            _refuse(self.file, error)
        except BaseException:  # an interrupt between write and fsync: the row counts as not written
            with contextlib.suppress(OSError):
                self._roll_back()
            raise
        self._rows.append(json.loads(line))
        self._keys.add(row["key"])

    def _write(self, data: bytes) -> None:
        """One write and an fsync; a short write (a disk that fills up) goes on until the error shows."""
        written = os.write(self._descriptor, data)
        while written < len(data):
            written += os.write(self._descriptor, data[written:])
        os.fsync(self._descriptor)
        self._size += len(data)

    def _roll_back(self) -> None:
        """Cut the file back to the last whole row."""
        if os.fstat(self._descriptor).st_size > self._size:
            os.ftruncate(self._descriptor, self._size)
            os.fsync(self._descriptor)

    def done(self) -> set[str]:
        """The keys of the rows that are in the store."""
        return set(self._keys)

    def rows(self) -> list[Row]:
        """The rows, in the order in which they were added."""
        return list(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        """Give the folder back; may be called twice."""
        for name in ("_descriptor", "_lock"):
            descriptor = getattr(self, name)
            setattr(self, name, -1)
            if descriptor >= 0:
                os.close(descriptor)

    def __enter__(self) -> ResultStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _line(row: Row) -> bytes:
    """The row as one line of JSON with its newline."""
    key = row.get("key") if isinstance(row, dict) else None
    if not isinstance(key, str) or not key:
        raise InvalidInputError("key of a row", key, "a string that is not empty", "use row_key(config)")
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8") + b"\n"
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"row {key}",
            str(error),
            "values that JSON can hold (finite numbers, text, lists, null)",
            "convert the value, and write null for a number that could not be measured",
        ) from error


def _is_row(data: bytes) -> bool:
    """Whether these bytes are one whole row. A part of a JSON object never is: its last brace is missing."""
    try:
        row = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("key"), str)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _parse(data: bytes, file: Path) -> tuple[list[Row], bytes]:
    """The rows, and what follows the last newline.

    A whole row that only lacks its newline is both in the rows and in the rest.
    """
    body, newline, tail = data.rpartition(b"\n")
    rows: list[Row] = []
    first_seen: dict[str, int] = {}
    lines = body.split(b"\n") if newline else []
    if tail and _is_row(tail):
        lines.append(tail)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not _is_row(line):
            raise InputFileError(
                str(file),
                f"line {number} is not a row: {line[:60]!r}",
                f"restore or delete line {number} (nothing was changed), or write to a new folder",
            )
        row = json.loads(line)
        if row["key"] in first_seen:
            raise InputFileError(
                str(file),
                f"lines {first_seen[row['key']]} and {number} have the same key {row['key']!r}",
                "delete one of the two lines (nothing was changed)",
            )
        first_seen[row["key"]] = number
        rows.append(row)
    return rows, tail


def _take_lock(path: Path) -> int:
    """Lock the folder for this process. The system drops the lock when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError as error:  # pragma: no cover (Windows)
        raise OutputError(str(path), "this system has no file locks (fcntl)", "use Linux or macOS") from error
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise OutputError(
            str(path.parent),
            f"another process (pid {holder}) is writing to this folder",
            "wait until it has finished, stop it, or choose another folder",
        ) from error
    with contextlib.suppress(OSError):  # the number only makes the message above better
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
    return descriptor


def _sync_folder(folder: Path) -> None:
    """Make a new or renamed name in the folder durable; file systems that can't do this say EINVAL."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _refuse(path: Path, error: OSError) -> NoReturn:
    """Turn an error of the system into one that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise OutputError(
            str(path),
            "no space left on the disk; the rows written before are intact",
            "free some space and run the same command again: it goes on where it stopped",
        ) from error
    raise OutputError(str(path), _reason(error), "check that the folder can be written") from error

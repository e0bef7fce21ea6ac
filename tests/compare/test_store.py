"""The store loses no row and doubles none: not when killed, not on a full disk, not with two writers."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparing.compare import store as store_module
from sparing.compare.store import ResultStore, read_rows, row_key, write_json_atomic, write_text_atomic
from sparing.errors import InputFileError, InvalidInputError, OutputError

SOURCE = Path(store_module.__file__).parents[2]

WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from sparing.compare.store import ResultStore
with ResultStore(sys.argv[1]) as store:
    number = len(store)
    while True:
        store.append({"key": f"row-{number}", "number": number, "filler": "é" * (number * 37 % 3000)})
        number += 1
        print(number, flush=True)
"""

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from sparing.compare.store import ResultStore
store = ResultStore(sys.argv[1])
print("locked", flush=True)
time.sleep(60)
"""


def run_script(script: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, str(folder), str(SOURCE)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def filled(folder: Path, count: int = 3) -> ResultStore:
    store = ResultStore(folder)
    for number in range(count):
        store.append({"key": f"k{number}", "score": number / 10, "name": "naïve \u2028 “x”"})
    return store


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    with filled(tmp_path) as store:
        assert store.done() == {"k0", "k1", "k2"}
        written = store.rows()
    with ResultStore(tmp_path) as again:
        assert again.rows() == written == read_rows(tmp_path) == read_rows(tmp_path / "results.jsonl")
        assert again.repaired is None
    assert read_rows(tmp_path / "nothing here") == []


def test_a_row_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for number in range(3):
        store.append({"key": str(number)})
        assert len(store.file.read_bytes().splitlines()) == number + 1
    store.close()
    with pytest.raises(OutputError, match="closed"):
        store.append({"key": "late"})


@pytest.mark.parametrize(
    "row",
    [
        {"score": 1.0},
        {"key": ""},
        {"key": 7},
        {"key": "new", "score": float("nan")},
        {"key": "new", "score": {1, 2}},
        {"key": "k1"},
    ],
    ids=["no key", "empty key", "number as key", "nan", "a set", "duplicate"],
)
def test_bad_rows_are_refused_and_leave_no_trace(tmp_path: Path, row: dict[str, object]) -> None:
    with filled(tmp_path) as store:
        before = store.file.read_bytes()
        with pytest.raises(InvalidInputError):
            store.append(row)
        assert store.file.read_bytes() == before
        store.append({"key": "new"})


def test_a_line_torn_anywhere_is_repaired(tmp_path: Path) -> None:
    """Cut the file at every byte of the last line: the rows before it stay, and it is never doubled."""
    filled(tmp_path / "source").close()
    data = (tmp_path / "source" / "results.jsonl").read_bytes()
    start = data.rindex(b"\n", 0, len(data) - 1) + 1
    for cut in range(start, len(data)):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "results.jsonl").write_bytes(data[:cut])
        whole = cut == len(data) - 1  # only the newline is missing
        expected = {"k0", "k1"} | ({"k2"} if whole else set())
        assert {row["key"] for row in read_rows(folder)} == expected
        with ResultStore(folder) as store:
            assert store.done() == expected
            assert (store.repaired is None) == (cut == start)
            assert store.file.read_bytes() == (data if whole else data[:start])
            for missing in {"k0", "k1", "k2"} - store.done():
                store.append({"key": missing})
        assert [row["key"] for row in read_rows(folder)] == ["k0", "k1", "k2"]
        torn = folder / "results.torn"
        assert torn.exists() == (start < cut < len(data) - 1)
        if torn.exists():
            assert torn.read_bytes() == data[start:cut] + b"\n"


def test_zeros_left_by_a_power_cut_are_set_aside(tmp_path: Path) -> None:
    filled(tmp_path).close()
    with open(tmp_path / "results.jsonl", "ab") as stream:
        stream.write(b"\0" * 4096)
    with ResultStore(tmp_path) as store:
        assert store.done() == {"k0", "k1", "k2"}


@pytest.mark.parametrize("bad", [b'{"key": "k1", "sco', b"[1]", b'{"score": 1}', b"\xff\xfe", b'{"key":"a","s":NaN}'])
def test_a_corrupt_line_names_file_and_line_and_changes_nothing(tmp_path: Path, bad: bytes) -> None:
    filled(tmp_path).close()
    file = tmp_path / "results.jsonl"
    lines = file.read_bytes().splitlines()
    damaged = b"\n".join([lines[0], bad, lines[2]]) + b"\n" + b'{"key": "torn'
    file.write_bytes(damaged)
    for reader in (ResultStore, read_rows):
        with pytest.raises(InputFileError, match=r"results\.jsonl.*line 2"):
            reader(tmp_path)
    assert file.read_bytes() == damaged
    file.write_bytes(b"\n".join([lines[0], lines[2]]) + b"\n")  # the failed opening holds no lock
    ResultStore(tmp_path).close()


def test_doubled_keys_in_the_file_are_an_error(tmp_path: Path) -> None:
    filled(tmp_path).close()
    file = tmp_path / "results.jsonl"
    file.write_bytes(file.read_bytes() + file.read_bytes().splitlines()[1] + b"\n")
    with pytest.raises(InputFileError, match="lines 2 and 4"):
        ResultStore(tmp_path)


def test_killed_again_and_again(tmp_path: Path) -> None:
    """SIGKILL at random moments: every row whose append returned is there, in order, once."""
    rng = random.Random(0)
    for _ in range(15):
        with run_script(WRITER, tmp_path) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first, "the writer did not start"
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            acknowledged = [int(first), *(int(line) for line in process.stdout.read().splitlines())]
        numbers = [row["number"] for row in read_rows(tmp_path)]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) >= acknowledged[-1]
    with ResultStore(tmp_path) as store:
        assert len(store) == len(numbers)


def test_two_writers_are_refused_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    with run_script(HOLDER, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "locked"
        with pytest.raises(OutputError, match=rf"pid {process.pid}"):
            ResultStore(tmp_path)
        assert read_rows(tmp_path) == []  # reading needs no lock
        process.kill()
    with ResultStore(tmp_path) as store, pytest.raises(OutputError, match="another process"):
        ResultStore(store.folder)


class FullDisk:
    """Stands in for os.write, or os.fsync: lets some bytes through, then the disk is full."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.real_write = os.write

    def write(self, descriptor: int, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: self.room]
        self.room -= len(part)
        return self.real_write(descriptor, part)

    @staticmethod
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("room", [0, 1, 10])
def test_disk_full_in_the_middle_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    with filled(tmp_path) as store:
        before = store.file.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", FullDisk(room).write)
            with pytest.raises(OutputError, match="no space left"):
                store.append({"key": "late", "score": 1.0})
        assert store.file.read_bytes() == before
        assert "late" not in store.done()
        store.append({"key": "late", "score": 1.0})
    assert [row["key"] for row in read_rows(tmp_path)] == ["k0", "k1", "k2", "late"]


def test_disk_that_fails_in_fsync_and_in_the_clean_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the roll-back fails: the row still isn't counted, and the next append cleans up first."""
    with filled(tmp_path) as store:
        before = store.file.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", FullDisk.fsync)
            patch.setattr(os, "ftruncate", lambda *_: FullDisk.fsync(0))
            with pytest.raises(OutputError, match="no space left"):
                store.append({"key": "late"})
        assert store.file.read_bytes() != before
        store.append({"key": "late"})
    assert [row["key"] for row in read_rows(tmp_path)] == ["k0", "k1", "k2", "late"]


def test_an_interrupt_before_fsync_leaves_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with filled(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.append({"key": "late"})
        store.append({"key": "late"})
    assert [row["key"] for row in read_rows(tmp_path)] == ["k0", "k1", "k2", "late"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> object:
    """A real file system of 64 KiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = (
        sys.platform == "linux"
        and os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("needs root on Linux to mount a file system of 64 KiB; the faked full disk is tested above")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk(tiny_disk: Path) -> None:
    with ResultStore(tiny_disk / "out") as store:
        count = 0
        with pytest.raises(OutputError, match="no space left"):  # noqa: PT012
            for count in range(1000):
                store.append({"key": f"k{count}", "filler": "x" * 1500})
        assert 5 < count < 60
        assert len(store) == count
        with pytest.raises(OutputError, match="no space left"):
            write_json_atomic(tiny_disk / "out" / "run.json", {"filler": "x" * 100_000})
    assert len(read_rows(tiny_disk / "out")) == count
    assert not [path for path in (tiny_disk / "out").iterdir() if path.suffix == ".tmp"]
    with ResultStore(tiny_disk / "out") as store:
        assert store.repaired is None
        assert store.done() == {f"k{number}" for number in range(count)}


def test_keys_are_stable_and_distinct() -> None:
    config = {"method": "snapkv", "keep": 0.25, "task": "needle", "seed": 0, "options": {"window": 32}}
    assert row_key(config) == "f01574b9a8387c3c"  # files of older versions stay readable
    assert row_key(dict(reversed(config.items()))) == row_key(config)
    assert row_key({"keep": 1}) != row_key({"keep": 1.0}) != row_key({"keep": "1"})
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r}); from sparing.compare.store import row_key; "
        f"print(row_key({config!r}))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == row_key(config)
    with pytest.raises(InvalidInputError):
        row_key({"keep": float("inf")})
    with pytest.raises(InvalidInputError):
        row_key({"keep": object()})


def test_atomic_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "run.json"
    write_json_atomic(target, {"ü": [1, None]})
    assert json.loads(target.read_text(encoding="utf-8")) == {"ü": [1, None]}
    monkeypatch.setattr(os, "fsync", FullDisk.fsync)
    with pytest.raises(OutputError, match="no space left"):
        write_text_atomic(target, "half")
    with pytest.raises(InvalidInputError):
        write_json_atomic(target, {"x": float("nan")})
    assert json.loads(target.read_text(encoding="utf-8")) == {"ü": [1, None]}
    assert [path.name for path in target.parent.iterdir()] == ["run.json"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        ResultStore(tmp_path / "file")

"""Commands run in this process, which saves loading torch anew for every one; nothing but exit codes may leave them."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparing.cli import main


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Our messages and click's; a traceback would have gone through `main` and failed the test."""
        return [line for line in self.err.splitlines() if line.lower().startswith("error: ")]


def sparing(*words: object) -> Finished:
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sparing", *map(str, words)])
        patch.setenv("COLUMNS", "160")
        try:
            main()
        except SystemExit as left:
            code = int(str(left.code))
    return Finished(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session", name="sparing")
def sparing_command():
    return sparing


@pytest.fixture(scope="session")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Retrieval scores of the bundled model: all heads of layer 2 copy, and head 0 of layer 3 nearly always."""
    path = tmp_path_factory.mktemp("scores") / "retrieval.safetensors"
    done = sparing("score", "--scorer", "retrieval", "--length", 128, "--samples", 2, "--out", path)
    assert done.code == 0, done.err
    return path


@pytest.fixture(scope="session")
def refused():
    """One message that says what is expected, exit code 2, nothing on standard output and no file left behind."""

    def check(folder: Path, expected: str, *words: object) -> None:
        before = sorted(folder.rglob("*"))
        done = sparing(*words)
        assert done.code == 2
        assert len(done.errors) == 1, done.err
        assert expected in done.errors[0]
        assert done.out == ""
        assert sorted(folder.rglob("*")) == before

    return check

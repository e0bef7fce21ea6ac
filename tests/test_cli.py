"""The command line as a newcomer and as a careless hand would use it, in real processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparing.cli import main

QUICK = ["--methods", "knorm,snapkv", "--keep", "0.5", "--lengths", "256", "--samples", "1"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from sparing.cli import main; main()", *words]


def sparing(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(command(*words), capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "out"
    done = sparing("compare", *QUICK, "--tasks", "needle_single,perplexity", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    assert str(folder / "report.html") in done.stdout
    return folder


def test_compare_writes_every_row_with_its_facts(finished: Path) -> None:
    written = rows(finished)
    assert len(written) == 3 * 2 * 2  # (full, knorm, snapkv) x tasks x modes
    for row in written:
        assert 0 <= row["low"] <= row["score"] <= row["high"] <= 1  # type: ignore[operator]
        assert row["bytes_kept"] <= row["bytes_full"]  # type: ignore[operator]
        assert row["prefill_s"] > 0  # type: ignore[operator]
        assert row["peak_rss_bytes"] > 10**7  # type: ignore[operator]
        assert row["mode"] in ("query-agnostic", "query-aware")
    full = [row for row in written if row["method"] == "full"]
    assert all(row["bytes_kept"] == row["bytes_full"] and row["worse_than_full"] == 0 for row in full)


def test_run_json_says_how_it_was_made(finished: Path) -> None:
    run = json.loads((finished / "run.json").read_text("utf-8"))
    for field in ("sparing", "torch", "transformers", "python", "hardware", "command", "seed", "commit", "finished"):
        assert field in run
    assert run["finished"] is not None
    assert "compare" in run["command"]


def test_the_report_is_one_file_without_network(finished: Path) -> None:
    page = (finished / "report.html").read_text("utf-8")
    assert "snapkv" in page
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_running_again_does_nothing_and_says_the_same(finished: Path) -> None:
    before = (finished / "results.jsonl").read_bytes()
    done = sparing("compare", *QUICK, "--tasks", "needle_single,perplexity", "--out", str(finished))
    assert done.returncode == 0, done.stderr
    assert (finished / "results.jsonl").read_bytes() == before


@pytest.mark.slow
def test_kill_minus_nine_loses_and_doubles_nothing(tmp_path: Path) -> None:
    words = ["compare", *QUICK, "--tasks", "needle_single,perplexity,kv_retrieval", "--out", str(tmp_path)]
    results = tmp_path / "results.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if results.exists() and results.stat().st_size > 0:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survived = results.read_bytes().count(b"\n")
    assert survived >= 1
    assert sparing(*words).returncode == 0
    keys = [row["key"] for row in rows(tmp_path)]
    assert len(keys) == len(set(keys)) == 3 * 3 * 2


def test_any_scorer_with_any_allocator(tmp_path: Path) -> None:
    names = "keydiff+adaptive(floor=0.1),tova+global,knorm+pyramid"
    words = ["--methods", names, "--keep", "0.5", "--lengths", "256", "--samples", "1", "--tasks", "needle_single"]
    done = sparing("compare", *words, "--mode", "query-agnostic", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {row["method"] for row in rows(tmp_path)} == {"full", *names.replace(",floor", ";floor").split(",")}


def test_the_users_own_file(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("The special magic number for old river is: 48213. The end.\nQ: Which number?\n", "utf-8")
    out = tmp_path / "out"
    done = sparing("compare", "--methods", "knorm", "--keep", "0.5", "--tasks", str(text), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert {row["length"] for row in rows(out)} == {None}


@pytest.mark.slow
def test_generate_streams_an_answer_and_says_what_was_kept(tmp_path: Path) -> None:
    context = tmp_path / "context.txt"
    context.write_text("The grass is green. " * 40 + "The special magic number for old river is: 48213. ", "utf-8")
    question = "What is the special magic number for old river? The special magic number for old river is:"
    words = ["generate", "--context", str(context), "--question", question, "--max-new-tokens", "8"]
    done = sparing(*words, "--method", "snapkv", "--keep", "0.5", "--compare-full")
    assert done.returncode == 0, done.stderr
    assert "full cache" in done.stdout
    assert done.stdout.count("bytes") == 2
    aware = sparing(*words, "--query-aware")
    assert "48213" in aware.stdout


BAD = {
    "unknown method": (["compare", "--methods", "snapvk"], "did you mean snapkv"),
    "unknown allocator": (["compare", "--methods", "snapkv+adaptve"], "did you mean adaptive"),
    "unknown field beside a draft": (["compare", "--methods", "speckv(draft=no/such,windw=3)"], "did you mean window"),
    "unknown field": (["compare", "--methods", "snapkv(windw=3)"], "did you mean window"),
    "keep above 1": (["compare", "--keep", "1.5"], "ratio in (0, 1]"),
    "keep of 0": (["compare", "--keep", "0.0"], "ratio in (0, 1]"),
    "keep that is no size": (["compare", "--keep", "64 parsecs"], "ratio in (0, 1]"),
    "unknown task": (["compare", "--tasks", "needle_singel"], "needle_single"),
    "too long": (["compare", "--lengths", "100000"], "at most 8192"),
    "too short": (["compare", "--lengths", "20", "--tasks", "needle_single"], "at least"),
    "no lengths": (["compare", "--lengths", ""], "lengths"),
    "lengths that are no numbers": (["compare", "--lengths", "1k"], "whole numbers"),
    "no model": (["compare", "--model", "no/such/folder"], "no such folder"),
    "samples": (["compare", "--samples", "0"], "samples"),
    "no such option": (["compare", "--keeep", "1"], "--keep"),
    "no such file": (["generate", "--context", "missing.txt", "--question", "Why?"], "missing.txt"),
}


def in_process(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command run here, which saves loading torch again for every one."""
    monkeypatch.setattr(sys, "argv", ["sparing", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_line_and_exit_code_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = BAD[name]
    extra = ["--out", str(tmp_path / "out")] if words[0] == "compare" else []
    monkeypatch.chdir(tmp_path)
    assert in_process([*words, *extra], monkeypatch) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "bad input leaves nothing behind"


def test_an_error_shows_no_traceback() -> None:
    done = sparing("compare", "--keep", "1.5")
    assert done.returncode == 2
    assert done.stderr.startswith("error: keep: got 1.5")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", "empty"), (b"\x00\x01\x02", "binary"), (b"\xff\xfe\xfa", "UTF-8")]
)
def test_a_context_that_is_no_text(
    content: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "context.txt"
    path.write_bytes(content)
    assert in_process(["generate", "--context", str(path), "--question", "Why?"], monkeypatch) == 2
    assert expected in capsys.readouterr().err


def test_half_written_results_are_repaired_and_said(finished: Path, tmp_path: Path) -> None:
    whole = (finished / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(whole[:-40])
    done = sparing("compare", *QUICK, "--tasks", "needle_single,perplexity", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "torn" in done.stderr
    assert sorted(row["key"] for row in rows(tmp_path)) == sorted(row["key"] for row in rows(finished))


def test_results_that_are_damaged_in_the_middle_are_left_alone(finished: Path, tmp_path: Path) -> None:
    lines = (finished / "results.jsonl").read_bytes().splitlines(keepends=True)
    damaged = lines[0] + b"{half a row\n" + b"".join(lines[1:])
    (tmp_path / "results.jsonl").write_bytes(damaged)
    done = sparing("compare", *QUICK, "--tasks", "needle_single", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "line 2" in done.stderr
    assert (tmp_path / "results.jsonl").read_bytes() == damaged


def test_a_disk_that_takes_no_more_is_said_and_earlier_rows_stay(finished: Path, tmp_path: Path) -> None:
    before = (finished / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(before)

    def almost_full() -> None:  # files may grow to this size and no further
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, len(before) + 100))

    words = ["compare", *QUICK, "--tasks", "needle_single,kv_retrieval", "--out", str(tmp_path)]
    done = subprocess.run(command(*words), capture_output=True, text=True, preexec_fn=almost_full, check=False)
    assert done.returncode == 2
    assert "results.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "results.jsonl").read_bytes() == before


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    words = ["compare", *QUICK, "--samples", "50", "--tasks", "needle_single", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "run.json").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from there" in errors
    assert "Traceback" not in errors

"""`sparing serve` as a process: it starts, answers, and stops when told to; what cannot work is said in one line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, AuthenticationError, OpenAI

from sparing.cli import cli, main
from sparing.cli.serving import serve
from sparing.core.parsing import parse_method
from sparing.core.ranker import parse_ranker
from sparing.errors import InvalidInputError
from sparing.loading import LoadedModel, ModelSpec
from sparing.recipe import Recipe
from sparing.serve import server
from sparing.serve.settings import Settings

COMMAND = (
    "import sys\nfrom sparing.cli import cli, main\nfrom sparing.cli.serving import serve\ncli.add_command(serve)\n"
)


@contextmanager
def started(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, once it says that it serves."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND + "main()", "serve", "--port", "0", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"^serving .* at (http://\S+) \(Ctrl-C stops\)$", line)
        assert found, line + (process.stderr.read() if process.stderr and process.poll() is not None else "")
        yield process, found.group(1)
    finally:
        process.kill()
        process.communicate()


def client_of(url: str, token: str = "x") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)


def test_it_serves_a_recipe_and_ctrl_c_lets_requests_end(tmp_path: Path) -> None:
    spec, method = ModelSpec("bundled", device="cpu"), parse_method("streaming_llm", 0.5)
    Recipe(spec, spec.load().fingerprint, "streaming_llm", 0.5, repr(method)).save(tmp_path / "recipe.json")
    with started("--recipe", str(tmp_path / "recipe.json"), SPARING_API_KEY="open-sesame") as (process, url):
        with client_of(url, "wrong") as client, pytest.raises(AuthenticationError, match="token"):
            client.models.list()
        with client_of(url, "open-sesame") as client:
            extra: Any = client.models.list().data[0].model_extra
            assert (extra["sparing"]["method"], extra["sparing"]["keep"]) == ("streaming_llm", 0.5)
            pieces = iter(
                client.completions.create(
                    model="bundled", prompt="It was a dark night", max_tokens=100, stream=True, temperature=0
                )
            )
            next(pieces)
            process.send_signal(signal.SIGINT)
            assert list(pieces)[-1].choices[0].finish_reason == "length"
        out, errors = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "stopped\n")
        assert "Traceback" not in errors


def test_a_second_ctrl_c_ends_requests_at_once() -> None:
    with started() as (process, url), client_of(url) as client:
        pieces = iter(client.completions.create(model="bundled", prompt="It was", max_tokens=8000, stream=True))
        next(pieces)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        with pytest.raises(APIError, match="shutting down"):
            list(pieces)
        out, errors = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "stopped\n")
        assert "Traceback" not in errors


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that says why, at exit code 2."""
    cli.add_command(serve)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sparing", "serve", *words])
        patch.delenv("SPARING_API_KEY", raising=False)
        with pytest.raises(SystemExit) as left:
            main()
    said = capsys.readouterr()
    assert left.value.code == 2
    assert said.out == ""
    [line] = [line for line in said.err.splitlines() if line.lower().startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--host", "0.0.0.0"), "SPARING_API_KEY"),
        (("--host", "no.such.machine.invalid", "--token-env", "PATH"), "a free address of this machine"),
        (("--token-env", "NO_SUCH_VARIABLE"), "NO_SUCH_VARIABLE"),
        (("--memory", "plenty"), "memory"),
        (("--max-request-bytes", "0B"), "max_request_bytes"),
        (("--max-concurrent", "0"), "max-concurrent"),
        (("--port", "70000"), "70000"),
        (("--method", "nothing"), "nothing"),
        (("--keep", "2.5"), "2.5"),
        (("--model", "no/such-folder-here", "--dtype", "float12"), "float12"),
        (("--recipe", "missing.json"), "missing.json"),
        (("--recipe", "missing.json", "--keep", "0.5"), "--keep"),
        (("--recipe", "missing.json", "--method", "h2o"), "--method"),
        (("--recipe", "missing.json", "--model", "bundled"), "--model"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    assert expected in refused(capsys, "--port", "0", *words)  # of an option given twice the last counts


def test_an_address_in_use_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused(capsys, "--port", str(port), "--model", "no/such-model")


def run(loaded: LoadedModel, bound: socket.socket, on_start: Callable[[], None]) -> None:
    method, settings = parse_method("snapkv", 0.5), Settings(port=bound.getsockname()[1])
    server.serve(loaded, method, settings, bound, on_start, parse_ranker("icr"))


def test_clients_can_connect_once_it_says_so(loaded: LoadedModel) -> None:
    with server.bind(Settings(port=0)) as bound:

        def on_start() -> None:
            socket.create_connection(bound.getsockname()).close()
            raise KeyboardInterrupt

        run(loaded, bound, on_start)


def test_of_two_servers_at_an_address_the_later_one_says_so(loaded: LoadedModel) -> None:
    """Both could bind it as long as none listened."""
    with server.bind(Settings(port=0)) as one, server.bind(Settings(port=one.getsockname()[1])) as other:
        one.listen()
        with pytest.raises(InvalidInputError, match="a free address of this machine"):
            run(loaded, other, lambda: pytest.fail("it says that it serves"))


def test_a_method_that_does_not_fit_the_model_is_refused_at_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert "duo" in refused(capsys, "--port", "0", "--method", "duo")


def test_without_the_extra_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparing.serve.find_spec", lambda name: None)
    assert 'pip install "sparing[serve]"' in refused(capsys)


def test_help_needs_nothing_heavy() -> None:
    code = f"{COMMAND}try:\n    cli(['serve', '--help'])\nexcept SystemExit:\n    pass\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'fastapi')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--token-env" in done.stdout

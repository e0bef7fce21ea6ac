"""`sparing serve` under a bounded load: hundreds of requests, 16 at a time, none lost, none mixed up.

Every prompt states a number of its own, so an answer that holds another prompt's number is seen. Then one document is
asked many times, by its `cache_key` and with the whole text in every prompt. The server is a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from common import conditions, header_text, table, use_threads, write
from openai import AsyncOpenAI
from transformers import AutoTokenizer

from sparing.models import resolve
from sparing.tasks import haystack
from sparing.tasks.formats import NEEDLE, NEEDLE_QUESTION

GREEDY: dict[str, Any] = {"model": "bundled", "temperature": 0, "max_tokens": 8}


@dataclass(frozen=True)
class Answer:
    """`text` is None if the request was lost. Seconds to the end, and to the first piece of a stream."""

    text: str | None
    seconds: float
    first: float | None


# -- what is asked --------------------------------------------------------------------------------------------------


def texts(count: int, tokens: int, facts: int, seed: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """Texts of about so many tokens with (key, number) facts in them; no number is in two texts."""
    rng, tokenizer = random.Random(seed), AutoTokenizer.from_pretrained(resolve("bundled"))
    numbers = iter(rng.sample(range(10_000, 100_000), count * facts))
    made = []
    for _ in range(count):
        pairs = [(key, str(next(numbers))) for key in haystack.draw_keys(rng, facts)]
        needles = [NEEDLE.format(kind="number", key=key, value=value) for key, value in pairs]
        source, sentences, room = haystack.text(rng), [], tokens
        while room > 0:
            sentences.append(next(source))
            room -= len(tokenizer.encode(sentences[-1], add_special_tokens=False))
        for needle in needles:
            sentences.insert(rng.randrange(len(sentences)), needle)
        made.append(("".join(sentences).strip(), pairs))
    return made


def question(key: str) -> str:
    return NEEDLE_QUESTION.format(kind="number", key=key)


# -- asking ---------------------------------------------------------------------------------------------------------


async def ask(client: AsyncOpenAI, prompt: str, is_stream: bool, **options: Any) -> Answer:
    began, first, text = time.perf_counter(), None, ""
    try:
        if is_stream:
            async for chunk in await client.completions.create(prompt=prompt, stream=True, **GREEDY, **options):
                first = first or time.perf_counter() - began
                text += chunk.choices[0].text
        else:
            text = (await client.completions.create(prompt=prompt, **GREEDY, **options)).choices[0].text
    except Exception as error:  # whatever it is, the request is lost, and counted as that
        print(f"lost: {error!r}", file=sys.stderr)
        return Answer(None, time.perf_counter() - began, None)
    return Answer(text, time.perf_counter() - began, first)


async def load(url: str, prompts: list[str], at_once: int) -> tuple[list[Answer], float, int]:
    """All answers, the seconds that they took together, and the most bytes that were promised at a time."""
    places, peak = asyncio.Semaphore(at_once), 0

    async def one(number: int, prompt: str) -> Answer:
        async with places:
            return await ask(client, prompt, number % 2 == 1)

    async def watch() -> None:
        nonlocal peak
        async with httpx.AsyncClient() as http:
            while True:
                health = (await http.get(f"{url}/health")).json()
                peak = max(peak, health["bytes"]["reserved"])
                await asyncio.sleep(0.1)

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        watcher = asyncio.create_task(watch())
        began = time.perf_counter()
        answers = await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
        seconds = time.perf_counter() - began
        watcher.cancel()
    return answers, seconds, peak


async def reuse(url: str, text: str, facts: list[tuple[str, str]]) -> dict[str, Any]:
    """One text asked about every fact: by its key, and with the whole text each time, taking turns."""
    held, whole, right = [], [], [0, 0]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        began = time.perf_counter()
        document: Any = await client.post("/documents", body={"text": text}, cast_to=object)
        reading = time.perf_counter() - began
        for key, value in facts:
            by_key = await ask(client, question(key), False, extra_body={"cache_key": document["cache_key"]})
            by_text = await ask(client, text + question(key), False)
            held.append(by_key.seconds)
            whole.append(by_text.seconds)
            right[0] += value in (by_key.text or "")
            right[1] += value in (by_text.text or "")
    ratios = [slow / fast for fast, slow in zip(held, whole, strict=True)]
    return {
        "tokens": document["usage"]["prompt_tokens"], "kept": document["usage"]["sparing"], "reading": reading,
        "by_key": statistics.median(held), "by_text": statistics.median(whole), "faster": statistics.median(ratios),
        "questions": len(facts), "right_by_key": right[0], "right_by_text": right[1],
    }  # fmt: skip


# -- the server -----------------------------------------------------------------------------------------------------


@contextmanager
def server(method: str, keep: str, threads: int) -> Iterator[str]:
    """A running `sparing serve`, in this environment, and its address."""
    words = ["--port", "0", "--method", method, "--keep", keep, "--max-queue", "64"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from sparing.cli.serving import serve; serve()", *words],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, "the server did not start"
        yield found.group()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def counted(answers: list[Answer], numbers: list[str]) -> dict[str, Any]:
    """How many answers are right, lost, or hold a number of another prompt."""
    known, found = set(numbers), {"requests": len(answers), "right": 0, "lost": 0, "mixed_up": 0}
    for answer, number in zip(answers, numbers, strict=True):
        said = set(re.findall(r"\d{5}", answer.text or ""))
        found["lost"] += answer.text is None
        found["right"] += number in said
        found["mixed_up"] += bool((said & known) - {number})
    return found


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p95": ordered[int(0.95 * (len(ordered) - 1))], "most": ordered[-1]}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    asked = texts(arguments.requests, arguments.tokens, 1, arguments.seed)
    prompts, numbers = [text + question(facts[0][0]) for text, facts in asked], [facts[0][1] for _, facts in asked]
    [(text, facts)] = texts(1, arguments.document, arguments.questions, arguments.seed + 1)
    with server(arguments.method, arguments.keep, arguments.threads) as url:
        answers, seconds, peak = asyncio.run(load(url, prompts, arguments.at_once))
        health = httpx.get(f"{url}/health").json()
        held = asyncio.run(reuse(url, text, facts))
    return {
        **counted(answers, numbers), "seconds": seconds, "per_second": len(answers) / seconds,
        "latency": spread([answer.seconds for answer in answers]),
        "first_token": spread([answer.first for answer in answers if answer.first is not None]),
        "peak_bytes_promised": peak, "bytes_left": health["bytes"]["reserved"], "live_left": health["requests"],
        "document": held,
    }  # fmt: skip


def words(result: dict[str, Any]) -> str:
    loaded, held, asked = result["load"], result["load"]["document"], result["arguments"]
    ms = [f"{1000 * loaded[what][which]:.0f}" for what in ("latency", "first_token")
          for which in ("median", "p95", "most")]  # fmt: skip
    header = ["requests", "at once", "lost", "mixed up", "right", "requests/s", "median ms", "p95", "most",
              "first token, median ms", "p95", "most", "most MiB promised", "bytes left"]  # fmt: skip
    row = [loaded["requests"], asked["at_once"], loaded["lost"], loaded["mixed_up"], loaded["right"],
           f"{loaded['per_second']:.1f}", *ms, f"{loaded['peak_bytes_promised'] / 2**20:.1f}",
           loaded["bytes_left"]]  # fmt: skip
    kept = held["kept"]
    about = ["document, tokens", "MiB held", "of", "questions", "reading once, ms", "by key, ms", "whole text, ms",
             "faster", "right by key", "right, whole text"]  # fmt: skip
    second = [held["tokens"], f"{kept['bytes_kept'] / 2**20:.2f}", f"{kept['bytes_full'] / 2**20:.2f}",
              held["questions"], f"{1000 * held['reading']:.0f}", f"{1000 * held['by_key']:.0f}",
              f"{1000 * held['by_text']:.0f}", f"{held['faster']:.1f} x", held["right_by_key"],
              held["right_by_text"]]  # fmt: skip
    lines = [
        header_text("`sparing serve` under load", result),
        f"- Bundled model, {asked['method']}, keep {asked['keep']}; prompts of about {asked['tokens']} tokens with a "
        "number each, 8 tokens written, every other request a stream; wall times of a machine that others use",
        "- A document is compressed before any question is known (query-agnostic); with the whole text in the prompt "
        "the method sees the question",
        "", table(header, [row]), "", table(about, [second]),
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="about, of each prompt")
    parser.add_argument("--document", type=int, default=1000, help="about, tokens of the document")
    parser.add_argument("--questions", type=int, default=20, help="about the document")
    parser.add_argument("--method", default="snapkv")
    parser.add_argument("--keep", default="0.5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    result = conditions(arguments.seed, "fastapi", "uvicorn", "openai")
    result |= {"arguments": vars(arguments), "load": measure(arguments)}
    loaded = result["load"]
    write("serve_load", result, words(result))
    if loaded["lost"] or loaded["mixed_up"] or loaded["bytes_left"]:
        sys.exit("requests were lost or mixed up, or bytes stayed behind")


if __name__ == "__main__":
    main()

"""`sparing generate`: one question, answered from a compressed cache while you watch."""

from __future__ import annotations

import time

import click

from sparing.compare.engine import FULL, Engine, Output, Reading
from sparing.core.method import Method
from sparing.errors import InvalidInputError
from sparing.loading import LoadedModel
from sparing.session import use
from sparing.tasks.chat import prompt_parts


def ask(
    loaded: LoadedModel,
    method: Method,
    context: str,
    question: str,
    max_new_tokens: int,
    query_aware: bool = False,
    compare_full: bool = False,
) -> None:
    """Stream the answer to standard output, then say what was kept, the bytes and the time.

    Raises:
        InvalidInputError: the text is longer than the model allows. MethodRefusedError: see the method.
    """
    chat = loaded.spec.chat
    asked = question if question[0].isspace() else ("\n\n" if chat else "\n") + question
    context_ids, (question_ids,) = prompt_parts(loaded.tokenizer, context, [asked], chat)
    needed = len(context_ids) + len(question_ids) + max_new_tokens
    if loaded.max_length is not None and needed > loaded.max_length:
        allowed = (
            f"at most {loaded.max_length} tokens for context, question and answer, what {loaded.name} was made for"
        )
        raise InvalidInputError("length", needed, allowed, "shorten the text or use another model")
    prompt, fed = ([*context_ids, *question_ids], []) if query_aware else (context_ids, question_ids)
    with use(loaded.model, method) as session:
        engine = Engine(loaded, session)
        for each in (method, FULL) if compare_full else (method,):
            reading = engine.read(prompt, [each])
            if compare_full:
                click.secho("full cache" if each is FULL else f"{method.label}, keep {method.keep}", bold=True)
            _answer(engine, reading, each, fed, max_new_tokens)


def _answer(engine: Engine, reading: Reading, method: Method, fed: list[int], max_new_tokens: int) -> None:
    compressed = engine.compress(reading, method)
    tokens: list[int] = []
    shown = ""

    def show(token: int) -> None:
        nonlocal shown
        tokens.append(token)
        text = engine.text(Output(tokens, 0.0, 0))
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
            click.echo(text[len(shown) :], nl=False)
            shown = text

    began = time.perf_counter()
    first = None if fed else reading.next_logits
    output = engine.answer(compressed, fed, max_new_tokens, first, show)
    seconds = time.perf_counter() - began
    report = compressed.cache.report()
    plan = report.plan
    read = f", {compressed.read[-1]:.1%} of them read per token" if compressed.read else ""
    prefill = "".join(f"{each}; " for each in (report.prompt, report.prefill) if each)
    entries = f"kept {plan.tokens_kept:,} of {plan.tokens_seen:,} entries, " if plan else "kept everything, "
    click.secho(
        f"\n[{entries}{report.bytes_kept:,} of {report.bytes_full:,} bytes ({report.share:.1%}){read}; "
        f"{prefill}read {reading.cache.evicting[0].seen} tokens in {compressed.seconds:.2f} s, "
        f"wrote {len(output.token_ids)} in {seconds:.2f} s]",
        dim=True,
    )

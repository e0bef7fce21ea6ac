"""The report as text: one closed file, everything escaped, the same for the same input. All rows are made up."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sample_rows import (
    HEADS,
    LAYERS,
    MANY_METHODS,
    METHODS,
    TASKS,
    perplexity_rows,
    sample_examples,
    sample_rows,
    sample_run,
)

from sparing.compare.report import maps, render_report, words
from sparing.compare.report.summary import summary

VOID = {"meta", "link", "input", "br"}
EVIL = "<script>alert('x')</script>\"'&"


class Page(HTMLParser):
    """Collects elements and text, and fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"doubled attribute in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [
            found for name, found in self.elements
            if name == tag and all(found.get(key.replace("_", "-")) == value for key, value in attributes.items())
        ]  # fmt: skip

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


MANY = sample_rows(MANY_METHODS, (0.05, 0.1, 0.25, 0.5), tuple(f"task_{i}" for i in range(10)), (512, 1024, 2048))
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any] | None]] = {
    "usual": (sample_run(), sample_rows(), sample_examples()),
    "many": (sample_run(), MANY, sample_examples(MANY_METHODS, 4000)),
    "full only": (sample_run(), [row for row in sample_rows() if row["method"] == "full"], None),
    "one of each": (sample_run(), sample_rows(METHODS[:1], (0.25,), TASKS[:1], (None,), ("query-aware",)), None),
    "perplexity": (sample_run(), perplexity_rows(), None),
    "perplexity and others": (sample_run(), sample_rows(METHODS[:3]) + perplexity_rows(), None),
    "every gate failed": (sample_run(), [row | {"score": 0.3, "low": 0.2, "high": 0.4} for row in sample_rows()], None),
    "no full": (sample_run(), [row for row in sample_rows() if row["method"] != "full"], None),
    "tokens and bytes": (sample_run(), sample_rows(METHODS[:2], (64, "256KiB")), None),
    "nothing": ({}, [], None),
}


@pytest.mark.parametrize("name", list(CASES))
def test_every_case_is_one_closed_file(name: str) -> None:
    text = render_report(*CASES[name])
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert len(text.encode()) < 3_000_000
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "audio", "video")
        for attribute, value in attributes.items():
            assert not attribute.startswith("on"), f"{attribute} in <{tag}>"
            if attribute in ("src", "href", "action", "xlink:href"):
                assert value is not None
                assert value.startswith(("#", "data:,"))
    assert "url(" not in text.replace("url(#hatch)", "")
    assert "@import" not in text
    assert not re.search(r"https?://|\bfetch\(|XMLHttpRequest", text)
    assert "nan" not in re.findall(r"\b(?:nan|None|inf|undefined)\b", page.text)
    assert not re.search(r'"[^"]*(?:nan|inf)[^"]*"', " ".join(re.findall(r'd="[^"]*"', text)))
    json.loads(json.dumps(data_of(text), allow_nan=False))


def test_the_policy_names_the_hash_of_the_script() -> None:
    text = render_report(*CASES["usual"])
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_the_same_input_gives_the_same_text() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import hashlib; from sample_rows import *;"
        "from sparing.compare.report import render_report as r;"
        "print(hashlib.sha256(r(sample_run(), sample_rows(), sample_examples()).encode()).hexdigest())"
    )
    folders = [str(Path(__file__).parent), str(Path(words.__file__).parents[3])]
    ran = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert hashlib.sha256(render_report(*CASES["usual"]).encode()).hexdigest() == ran.stdout.strip()


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import sparing.compare.store, sparing.compare.table,"
        "sparing.compare.report; print([m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules])"
    )
    folder = str(Path(words.__file__).parents[3])
    ran = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_structure() -> None:
    run, rows, example = CASES["usual"]
    page = Page(render_report(run, rows, example))
    cells, methods, keeps, modes = len(TASKS) * 2, len(METHODS), 3, 2
    charts = [found for found in page.all("svg") if "chart" in (found.get("class") or "").split()]
    assert len(charts) == modes * (cells + 2)
    assert all(found.get("aria-label") for found in charts)
    points = page.all("g", **{"class": "p"})
    assert len(points) == modes * (cells + 2) * methods * keeps
    assert all(found["aria-label"] for found in points)
    assert sum(found["tabindex"] == "0" for found in points) == len(charts)  # one stop of Tab a chart
    assert len(page.all("input", type="radio")) == modes
    assert len([found for found in page.all("svg") if "noise" in (found.get("class") or "").split()]) == modes
    assert all(found.get("scope") in ("col", "row", "rowgroup") for found in page.all("th"))
    for fact in ("sparing compare --methods", "Made-up CPU", "5.23.0", "0000000", "2026-01-02", "32.0 GiB"):
        assert fact in page.text
    assert "variable_tracking@1024: the full cache itself scores only 0.70" in page.text
    for section in summary(rows):
        for budget in section.budgets:
            assert words.recommend(section, budget).partition(": ")[2] in page.text


def test_modes_never_share_a_chart() -> None:
    run, rows, _ = CASES["usual"]
    text = render_report(run, rows, None)
    agnostic, aware = re.findall(r"<section data-section.*?</section>", text, re.DOTALL)
    for part, own, other in ((agnostic, "query-agnostic", "query-aware"), (aware, "query-aware", "query-agnostic")):
        assert own in part
        assert other not in part


def test_strings_of_the_user_stay_text() -> None:
    rows = [row | {"task": EVIL, "warning": EVIL, "metric": EVIL} for row in sample_rows(METHODS[:2], tasks=("t",))]
    rows = [row | {"method": EVIL + row["method"]} if row["method"] != "full" else row for row in rows]
    rows = [row | {"keep": EVIL, "keep_label": EVIL, "mode": EVIL + row["mode"], "model": EVIL} for row in rows]
    example = sample_examples((EVIL,))
    example |= {"task": EVIL, "question": EVIL, "answer": EVIL, "mode": EVIL}
    example["tokens"][5] = EVIL
    example["methods"][EVIL]["output"] = EVIL
    run = dict.fromkeys(sample_run(), EVIL) | {EVIL: EVIL, "hardware": {"cpu": EVIL, EVIL: EVIL}}
    text = render_report(run, rows, example)
    page = Page(text)
    assert len(page.all("script")) == 2
    assert "<script>alert" not in text
    assert html.escape(EVIL) in text
    assert data_of(text)["example"]["methods"][0]["name"] == EVIL
    ends = render_report({}, [], example | {"tokens": ["</script><!--<script>", "\u2028"], "answer": "-->"})
    assert ends.count("</script>") == 2


def test_the_answer_is_found_in_the_context() -> None:
    assert maps.answer_tokens(["The", " number", " is", " 48", "21", "5", "."], " 48215.") == [3, 4, 5]
    assert maps.answer_tokens(["▁a", "▁red", "▁fox", "▁and", "▁a", "▁blue", "▁cat"], "red fox, blue") == [1, 2, 5]
    assert maps.answer_tokens(["Ġx", "Ġy"], "nowhere") == []
    assert maps.answer_tokens(["a", "b"], "") == []


def test_kept_positions_survive_the_packing() -> None:
    example = sample_examples(METHODS[:2], 300)
    data = maps.example_data(example)
    for method in data["methods"]:
        for layer in range(LAYERS):
            for head in range(HEADS):
                bits = base64.b64decode(method["layers"][layer][head])
                kept = [at for at in range(data["shown"]) if bits[at >> 3] >> (at & 7) & 1]
                assert kept == example["methods"][method["name"]]["kept"][layer][head]


def test_a_long_context_is_shortened_around_the_answer() -> None:
    tokens = [f" w{i % 50}" for i in range(20_000)]
    tokens[11_111] = " NEEDLE"
    kept = [[list(range(0, 20_000, 4))], None]
    example = {"tokens": tokens, "answer": "NEEDLE", "methods": {"x": {"keep": 0.25, "output": "", "kept": kept}}}
    data = maps.example_data(example)
    assert data["shown"] <= maps.TOKENS_SHOWN + 2
    assert len(data["answer"]) == 1
    text = render_report({}, [], example)
    assert re.search(r"<em>… \d+ tokens …</em>", text)
    assert "<b> NEEDLE</b>" in text
    assert data["methods"][0]["layers"][1] is None


def test_layers_without_compression_are_said() -> None:
    rows = [row | {"kept_share": [None, [0.25, 1.0]]} for row in sample_rows(METHODS[:1])]
    text = render_report({}, rows)
    assert "not compressed" in text
    assert data_of(text)["maps"][0]["maps"]["snapkv|0"] == [None, [25, 100]]
    assert "hold no shares per head" in render_report({}, [row | {"kept_share": None} for row in rows])


def test_of_many_methods_only_the_best_are_drawn_at_first() -> None:
    page = Page(render_report(*CASES["many"]))
    boxes = page.all("input", type="checkbox")
    assert len(boxes) == 2 * len(MANY_METHODS)
    assert sum("checked" in box for box in boxes) == 2 * 6
    assert "The best 6 of 15 are drawn" in page.text


@pytest.mark.parametrize(
    ("computes_less", "start"),
    [
        ([False, False], "At 25 % of the cache"),
        ([True, True], "At 25 % of the prompt's attention"),
        ([True, False], "At 25 % of the cache or of the prompt's attention"),
    ],
)
def test_a_budget_is_named_by_what_it_is_a_share_of(computes_less, start):
    assert words.keep_words(0.25, "25 %", computes_less) == start

"""The page of a measurement in a real browser: every cell is reached by keyboard, nothing is asked of the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from browser import focus, focused, needs_browser, press, requests, resize, scheme

from sparing.compare.ablation_curve import AblationCurve
from sparing.compare.measurement import render_scores
from sparing.core.scores import ModelIdentity, Scores

pytestmark = needs_browser

MODEL = ModelIdentity("some/model", "LlamaForCausalLM", 32, 32, 8, 128, "0123456789ab")
CURVE = AblationCurve("retrieval", "needle", "zero", 10, 1.0, [1, 2], [0.5, 0.0], [1.0, 1.0], [[0.9], [0.8]], [])


def measurements() -> dict[str, Scores]:
    draw = torch.Generator().manual_seed(0)
    words = tuple(f" word{at}" for at in range(300))
    labels = {"position": words, "kind": ("attn", "mlp")}
    return {
        "heads": Scores(torch.randn(32, 32, generator=draw), ("layer", "head"), "retrieval", MODEL),
        "few": Scores(torch.randn(4, 4, generator=draw), ("layer", "head"), "retrieval", MODEL),
        "patching": Scores(
            torch.randn(6, 300, 2, generator=draw), ("layer", "position", "kind"), "patch", MODEL, labels=labels
        ),
        "timeline": Scores(torch.rand(2, 300, generator=draw), ("kind", "position"), "waad", MODEL, labels=labels),
    }


PAGES = {
    name: render_scores(scores, curve=CURVE, compare=scores if scores.values.dim() == 2 else None)
    for name, scores in measurements().items()
}


@pytest.fixture
def opened(driver: Any, tmp_path: Any, request: pytest.FixtureRequest) -> Any:
    file = tmp_path / "page.html"
    file.write_text(PAGES[getattr(request, "param", "few")], encoding="utf-8")
    requests(driver)
    driver.get_log("browser")
    resize(driver, 1280)
    scheme(driver, "light")
    driver.get(file.as_uri())
    return driver


@pytest.mark.parametrize("opened", list(PAGES), indirect=True)
def test_no_message_no_request_no_sideways_scrolling(opened: Any) -> None:
    assert opened.get_log("browser") == []
    assert all(url.startswith("file:") for url in requests(opened))
    for width in (375, 1280):
        resize(opened, width)
        assert opened.execute_script("return document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("opened", list(PAGES), indirect=True)
def test_text_is_not_smaller_than_it_should_be(opened: Any) -> None:
    sizes = opened.execute_script(
        "return [...document.querySelectorAll('.chart')]"
        ".map(c => c.getBoundingClientRect().width / c.viewBox.baseVal.width)"
    )
    assert sizes
    assert min(sizes) >= 0.9


def test_arrow_keys_walk_the_map_in_both_directions(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    focus(opened, ".map .p")
    assert focused(opened, "aria-label").startswith("layer 0, head 0")
    press(opened, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert focused(opened, "aria-label").startswith("layer 1, head 1")
    tip = opened.execute_script("return document.getElementById('tip').textContent")
    assert tip == focused(opened, "aria-label")
    press(opened, Keys.END)
    assert focused(opened, "aria-label").startswith("layer 3, head 3")
    press(opened, Keys.ESCAPE)
    assert opened.execute_script("return document.getElementById('tip').hidden")


def test_colours_say_sign_and_size_in_both_schemes(opened: Any) -> None:
    script = """
      return [...document.querySelectorAll('.map rect')].map(r => [r.className.baseVal, getComputedStyle(r).fill])"""
    for value in ("light", "dark"):
        scheme(opened, value)
        fills = dict(opened.execute_script(script))
        assert set(fills) == {"warm", "cold"}
        assert fills["warm"] != fills["cold"]


@pytest.mark.parametrize("opened", ["timeline"], indirect=True)
def test_a_token_says_its_value(opened: Any) -> None:
    opened.execute_script(
        "document.querySelectorAll('.tokens i')[3].dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))"
    )
    said = opened.execute_script("return document.getElementById('tip').textContent")
    value = float(measurements()["timeline"].values[0, 3])
    assert said == f"3: {value:.2g}"

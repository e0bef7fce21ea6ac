"""The page in a real browser: paste, read, ask; nothing but this server is asked, and no text becomes markup."""

from __future__ import annotations

import json
from typing import Any

import pytest
from browser import focus, needs_browser, press, requests, resize, scheme
from live import QUESTION, Live, load, needle, serving, wait_for

from sparing.core.parsing import parse_method

pytestmark = needs_browser

TEXT = needle("amber river", "71234") + " <b>bold</b> & 日本語 🎉"


@pytest.fixture
def opened(driver: Any, live: Live) -> Any:
    requests(driver)
    driver.get_log("browser")
    resize(driver, 1280)
    scheme(driver, "light")
    driver.get(live.url)
    wait_for(lambda: bool(text_of(driver, "#server")))
    return driver


def text_of(driver: Any, selector: str) -> str:
    return str(driver.execute_script("return document.querySelector(arguments[0]).textContent", selector))


def is_shown(driver: Any, selector: str) -> bool:
    return bool(driver.execute_script("return document.querySelector(arguments[0]).offsetHeight > 0", selector))


def fill(driver: Any, selector: str, text: str) -> None:
    """As pasting does; typing emoji is beyond the driver."""
    script = (
        "const e = document.querySelector(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))"
    )
    driver.execute_script(script, selector, text)


def read(driver: Any, text: str = TEXT) -> None:
    fill(driver, "#text", text)
    driver.find_element("css selector", "#read button").click()
    wait_for(lambda: is_shown(driver, "#kept") and not text_of(driver, "#reading"))


def ask(driver: Any, question: str) -> None:
    from selenium.webdriver.common.keys import Keys

    fill(driver, "#question", question)
    focus(driver, "#question")
    press(driver, Keys.ENTER)
    wait_for(lambda: "answered from" in text_of(driver, "#answers"))


def test_a_text_is_read_and_coloured_by_what_was_kept(opened: Any, live: Live) -> None:
    read(opened)
    assert text_of(opened, "#coloured") == TEXT
    drawn = opened.execute_script(
        "return [...document.querySelectorAll('#coloured i')].map(e => "
        "[Number(e.style.getPropertyValue('--share')), e.className, getComputedStyle(e).backgroundColor])"
    )
    key = live.get("/v1/documents").json()["data"][-1]["cache_key"]
    tokens = live.get(f"/v1/documents/{key}/tokens").json()
    shares = [share for text, share in zip(tokens["tokens"], tokens["kept"], strict=True) if text]
    assert [share for share, _, _ in drawn] == shares
    assert [kind for _, kind, _ in drawn] == ["" if share else "no" for share in shares]
    assert 0 in shares
    assert len({colour for *_, colour in drawn}) == len(set(shares)) > 4
    usage = live.get(f"/v1/documents/{key}").json()["usage"]
    saved = 1 - usage["sparing"]["bytes_kept"] / usage["sparing"]["bytes_full"]
    assert text_of(opened, "#saved") == f"{100 * saved:.0f} %"
    assert text_of(opened, "#oftokens").startswith(f"of {usage['prompt_tokens']} tokens")
    assert "KiB" in text_of(opened, "#bytes")
    assert opened.execute_script("return document.activeElement.id") == "keptname"


def test_a_question_is_answered_as_by_the_api(opened: Any, live: Live) -> None:
    read(opened)
    question = QUESTION.format(key="amber river")
    ask(opened, question)
    key = live.get("/v1/documents").json()["data"][-1]["cache_key"]
    body = {"model": "bundled", "messages": [{"role": "user", "content": question}], "cache_key": key}
    answer = live.post("/v1/chat/completions", json={**body, "temperature": 0, "max_tokens": 128}).json()
    assert text_of(opened, "#answers li p") == answer["choices"][0]["message"]["content"].lstrip()
    assert text_of(opened, "#answers b") == question
    assert not is_shown(opened, "#stop")


def test_asking_reads_a_text_that_is_not_read_yet(opened: Any) -> None:
    fill(opened, "#text", "Another text. " + TEXT)
    ask(opened, "Who?")
    assert text_of(opened, "#coloured") == "Another text. " + TEXT
    opened.execute_script("document.querySelector('#answers').replaceChildren()")
    fill(opened, "#text", TEXT)
    ask(opened, "Who?")
    assert text_of(opened, "#coloured") == TEXT


def test_no_text_becomes_markup_and_nothing_else_is_asked(opened: Any, live: Live) -> None:
    evil = "<img src=x onerror=alert(1)> <script>alert(2)</script> &amp; " + TEXT
    read(opened, evil)
    ask(opened, "<img src=y onerror=alert(3)>")
    assert text_of(opened, "#coloured") == evil
    assert (
        opened.execute_script("return document.querySelectorAll('img, #coloured script, #answers script').length") == 0
    )
    assert {url.split("/")[2] for url in requests(opened)} == {live.url.split("/")[2]}
    assert opened.get_log("browser") == []
    response = live.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_errors_are_said_and_gone_with_the_next_try(opened: Any, live: Live) -> None:
    opened.find_element("css selector", "#read button").click()
    wait_for(lambda: "there is no text yet" in text_of(opened, "#problem"))
    assert opened.execute_script("return document.activeElement.id") == "text"
    fill(opened, "#text", "x" * live.service.settings.max_request_bytes)
    opened.find_element("css selector", "#read button").click()
    wait_for(lambda: "more than the" in text_of(opened, "#problem"))
    read(opened)
    assert not is_shown(opened, "#problem")
    key = live.get("/v1/documents").json()["data"][-1]["cache_key"]
    live.http.delete(f"/v1/documents/{key}")
    fill(opened, "#question", "Who?")
    opened.find_element("css selector", "#ask button").click()
    wait_for(lambda: "no document has the key" in text_of(opened, "#problem"))
    assert text_of(opened, "#answers") == ""
    ask(opened, "Who?")  # reads the text again
    assert not is_shown(opened, "#problem")


def test_an_answer_can_be_stopped(opened: Any, live: Live) -> None:
    read(opened)
    fill(opened, "#question", "Who?")
    with live.held_up():
        opened.find_element("css selector", "#ask button").click()
        wait_for(lambda: is_shown(opened, "#stop") and live.service.waiting == 1)
        opened.find_element("css selector", "#stop").click()
        wait_for(lambda: "stopped" in text_of(opened, "#answers"))
        wait_for(lambda: any(job.cancelled for job in live.service._accepted))
    wait_for(lambda: not live.service._accepted)
    assert not is_shown(opened, "#problem")


def test_the_keyboard_reaches_everything_in_order(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    read(opened)
    focus(opened, ".skip")
    order = []
    for _ in range(5):
        press(opened, Keys.TAB)
        order.append(opened.execute_script("const e = document.activeElement; return e.id || e.textContent"))
        assert opened.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert order == ["text", "Read and compress", "coloured", "question", "Ask"]
    focus(opened, ".skip")
    assert opened.execute_script("return document.activeElement.getBoundingClientRect().top") >= 0
    press(opened, Keys.ENTER)
    assert opened.execute_script("return document.activeElement.id") == "text"


def contrast(driver: Any, selector: str) -> float:
    """WCAG 2 contrast of an element's text on the nearest background, translucent ones laid over what is below."""
    script = """
    const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
    const over = (top, below) => below.map((c, i) => top[i] * top[3] + c * (1 - top[3]));
    const light = (v) => v <= 10 ? v / 3294.6 : ((v / 255 + .055) / 1.055) ** 2.4;
    const shine = ([r, g, b]) => .2126 * light(r) + .7152 * light(g) + .0722 * light(b);
    return [...document.querySelectorAll(arguments[0])].map((element) => {
      const layers = []; let opacity = 1;
      for (let e = element; e; e = e.parentElement) { layers.push(rgba(getComputedStyle(e).backgroundColor));
        opacity *= Number(getComputedStyle(e).opacity); }
      const ground = layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
      const ink = rgba(getComputedStyle(element).color); ink[3] *= opacity;
      const [a, b] = [shine(over(ink, ground)), shine(ground)];
      return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    });
    """
    return float(min(driver.execute_script(script, selector)))


@pytest.mark.parametrize("value", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_can_be_read_in_light_and_dark_wide_and_narrow(opened: Any, value: str, width: int) -> None:
    scheme(opened, value)
    resize(opened, width)
    read(opened)
    ask(opened, QUESTION.format(key="amber river"))
    background = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(json.loads(background.replace("rgb(", "[").replace(")", "]"))) > 384) == (value == "light")
    for selector in ("p", "dt", "dd", "label", "button:not([disabled])", "textarea", "#coloured i", "h1, h2"):
        assert contrast(opened, selector) >= 4.5, selector
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_token_is_asked_for_where_one_is_needed(driver: Any) -> None:
    with serving(load(), parse_method("snapkv", 0.5), token="open-sesame") as strict:
        driver.get(strict.url)
        wait_for(lambda: is_shown(driver, "#access"))
        fill(driver, "#text", TEXT)
        driver.find_element("css selector", "#read button").click()
        wait_for(lambda: "Bearer" in text_of(driver, "#problem"))
        assert driver.execute_script("return document.activeElement.id") == "token"
        fill(driver, "#token", "open-sesame")
        read(driver)
        assert text_of(driver, "#coloured") == TEXT

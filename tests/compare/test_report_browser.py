"""The report in a real browser: draws, switches by keyboard, asks the network for nothing. All rows are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import focus, focused, needs_browser, press, requests, resize, scheme
from sample_rows import MANY_METHODS, perplexity_rows, sample_examples, sample_rows, sample_run

from sparing.compare.report import render_report

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("report"), render_report(sample_run(), sample_rows(), sample_examples()))


def write(folder: Path, text: str) -> str:
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    return file.as_uri()


def visible_sections(driver: Any) -> list[str]:
    script = (
        "return [...document.querySelectorAll('[data-section]')]"
        ".filter(e => e.offsetHeight).map(e => e.dataset.section)"
    )
    result: list[str] = driver.execute_script(script)
    return result


@pytest.fixture
def opened(driver: Any, page: str) -> Any:
    requests(driver)
    driver.get_log("browser")
    resize(driver, 1280)
    scheme(driver, "light")
    driver.get(page)
    return driver


def test_no_console_message_and_no_request(opened: Any, page: str) -> None:
    opened.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    assert opened.get_log("browser") == []
    assert requests(opened) == {page}


def test_charts_have_size(opened: Any) -> None:
    sizes = opened.execute_script(
        "return [...document.querySelectorAll('[data-section=\"0\"] .chart')].map(c => ["
        "c.getBoundingClientRect().width, c.getBoundingClientRect().height,"
        "[...c.querySelectorAll('.m > .line')].every(p => p.getTotalLength() > 20),"
        "[...c.querySelectorAll('use')].every(u => u.getBoundingClientRect().width > 3)])"
    )
    assert len(sizes) == 10
    for width, height, lines, markers in sizes:
        assert width > 250
        assert height > 150
        assert lines
        assert markers


def test_the_mode_switches_by_keyboard(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    assert visible_sections(opened) == ["0"]
    focus(opened, 'input[name="mode"]:checked')
    press(opened, Keys.ARROW_RIGHT)
    assert visible_sections(opened) == ["1"]
    press(opened, Keys.ARROW_LEFT)
    assert visible_sections(opened) == ["0"]


def test_tab_begins_at_the_skip_link(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    press(opened, Keys.TAB)
    assert focused(opened, "href") == "#main"
    assert opened.execute_script("return document.activeElement.getBoundingClientRect().top") >= 0


def test_arrow_keys_walk_the_points_and_the_tip_reads_them(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    focus(opened, '.chart .p[tabindex="0"]')
    first = focused(opened, "aria-label")
    press(opened, Keys.ARROW_RIGHT)
    second = focused(opened, "aria-label")
    assert "keep 10 %" in first
    assert "keep 25 %" in second
    tip = opened.execute_script("const t = document.getElementById('tip'); return [t.hidden, t.textContent]")
    assert tip == [False, second]
    press(opened, Keys.ESCAPE)
    assert opened.execute_script("return document.getElementById('tip').hidden")
    press(opened, Keys.END)
    assert "keep 50 %" in focused(opened, "aria-label")


def test_the_legend_hides_a_method_by_keyboard(opened: Any) -> None:
    count = (
        "return [...document.querySelectorAll('[data-section=\"0\"] .chart .m')]"
        ".filter(m => getComputedStyle(m).display !== 'none').length"
    )
    before = opened.execute_script(count)
    focus(opened, ".legend input")
    press(opened, " ")
    assert opened.execute_script(count) == before - 10 - 2  # its curve in ten charts, its name in two
    label = opened.execute_script(
        "return document.querySelector('.chart .p[tabindex=\"0\"]').getAttribute('aria-label')"
    )
    assert not label.startswith("snapkv")
    press(opened, " ")
    assert opened.execute_script(count) == before


def test_the_map_follows_its_selects(opened: Any) -> None:
    read = "return [...document.querySelectorAll('[data-section=\"0\"] .map tbody td')].map(t => t.textContent)"
    before = opened.execute_script(read)
    focus(opened, '[data-section="0"] [data-pick="method"]')
    press(opened, "adakv")
    after = opened.execute_script(read)
    assert len(before) == len(after) == 4 * 5
    assert set(before) == {"10"}
    assert len(set(after)) > 2
    note = opened.execute_script("return document.querySelector('[data-mapnote]').textContent")
    assert note.startswith("adakv, keep 10 %: heads keep from")


def test_the_example_follows_its_selects(opened: Any) -> None:
    expected = sample_examples()["methods"]["streaming"]["kept"]
    focus(opened, "#ex-method")
    press(opened, "streaming")
    focus(opened, "#ex-layer")
    press(opened, "layer 2")
    focus(opened, "#ex-head")
    press(opened, "head 3")
    kept = opened.execute_script(
        "return [...document.querySelectorAll('#ex-tokens i, #ex-tokens b')]"
        ".flatMap((e, at) => e.style.getPropertyValue('--v') === '100%' ? [at] : [])"
    )
    assert kept == expected[2][3]
    note = opened.execute_script("return document.getElementById('ex-note').textContent")
    assert note.startswith("streaming, keep 0.25: of 1 head")
    assert opened.execute_script("return document.getElementById('ex-output').textContent") == "48."
    answer = opened.execute_script(
        "return [...document.querySelectorAll('#ex-tokens b')].map(b => b.textContent).join('')"
    )
    assert answer == " 48215"


REPORTS = {
    "usual": lambda: render_report(sample_run(), sample_rows(), sample_examples()),
    "many": lambda: render_report(
        sample_run(),
        sample_rows(MANY_METHODS, (0.05, 0.1, 0.25, 0.5), tuple(f"a_rather_long_task_name_{i}" for i in range(10))),
        sample_examples(MANY_METHODS, 3000),
    ),
    "perplexity": lambda: render_report(sample_run(), perplexity_rows()),
    "full only": lambda: render_report({}, [row for row in sample_rows() if row["method"] == "full"]),
    "nothing": lambda: render_report({}, []),
    "long names": lambda: render_report(
        {"model": "organisation/" + "x" * 90, "command": "sparing " + "y" * 300},
        sample_rows(("method_with_a_name_of_forty_characters_yes",), tasks=("t" * 60,)),
    ),
}


@pytest.mark.parametrize("width", [375, 768, 1280])
@pytest.mark.parametrize("name", list(REPORTS))
def test_the_page_never_scrolls_sideways(driver: Any, tmp_path: Path, name: str, width: int) -> None:
    resize(driver, width)
    driver.get_log("browser")
    driver.get(write(tmp_path, REPORTS[name]()))
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.execute_script("return innerWidth") == width
    assert driver.get_log("browser") == []


def contrast(first: list[float], second: list[float]) -> float:
    """The contrast of two sRGB colours as WCAG 2 defines it."""

    def light(colour: list[float]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(first), light(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("value", ["light", "dark"])
def test_colours_can_be_read(opened: Any, value: str) -> None:
    scheme(opened, value)
    read = (
        "const box = document.createElement('i'); document.body.append(box);"
        "return arguments[0].map(n => { box.style.color = `var(${n})`;"
        "return getComputedStyle(box).color.match(/[\\d.]+/g).map(Number); })"
    )
    names = ["--bg", "--ink", "--soft", "--accent", "--warn", *(f"--c{number}" for number in range(8))]
    background, *colours = opened.execute_script(read, names)
    assert (sum(background) < 200) == (value == "dark")
    for name, colour in zip(names[1:], colours, strict=True):
        assert contrast(background, colour) >= (3.0 if name.startswith("--c") else 4.5), name


def test_a_hostile_task_name_does_not_run(driver: Any, tmp_path: Path) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    rows = [row | {"task": evil, "warning": evil} for row in sample_rows(tasks=("t",))]
    example = sample_examples()
    requests(driver)
    example["methods"] = {evil: next(iter(example["methods"].values())) | {"output": evil}}
    driver.get(write(tmp_path, render_report(sample_run() | {"model": evil}, rows, example)))
    assert "owned" not in driver.title.replace(evil, "")
    assert driver.execute_script("return document.querySelectorAll('img').length") == 0
    assert requests(driver) == {driver.current_url}

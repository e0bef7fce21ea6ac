"""What is seen of a measurement: the views' numbers, the page, the picture."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch

from sparing.compare.ablation_curve import AblationCurve
from sparing.compare.measurement import render_scores, save_png
from sparing.compare.measurement.views import ticks, unit_name, views
from sparing.core.scores import ModelIdentity, Scores
from sparing.errors import MissingExtraError, OutputError, ScoresMismatchError

MODEL = ModelIdentity("some/model", "LlamaForCausalLM", 2, 4, 2, 8, "0123456789ab")
NAN = math.nan


def heads(values=((0.0, 0.5, -0.25, NAN), (1.0, 0.1, 0.2, 0.3)), scorer="retrieval", **more) -> Scores:
    return Scores(torch.tensor(values), ("layer", "head"), scorer, MODEL, **more)


def patching() -> Scores:
    values = torch.arange(2 * 3 * 2).reshape(2, 3, 2) / 10
    labels = {"position": ("<s>", " The", "\n"), "kind": ("attn", "mlp")}
    return Scores(values, ("layer", "position", "kind"), "residual_patching", MODEL, labels=labels)


def timeline() -> Scores:
    values = torch.tensor([[NAN, 1.0, 2.0], [3.0, 0.0, NAN]])
    labels = {"kind": ("waad", "fai"), "position": ("<s>", " a", " b")}
    return Scores(values, ("kind", "position"), "waad_fai", MODEL, labels=labels)


CURVE = AblationCurve("retrieval", "needle_single", "zero", 10, 1.0, [1, 2], [0.5, 0.0], [1.0, 1.0],
                      [[1.0, 0.8], [0.9, 0.1]], [(1, 0), (0, 1)])  # fmt: skip


def cells(page: str) -> dict[str, str]:
    """Label of every map cell -> its rectangle's attributes."""
    return dict(re.findall(r'aria-label="([^"]*)"><rect ([^>]*)/>', page))


def test_a_map_of_heads_holds_every_value():
    found = cells(render_scores(heads()))
    assert len(found) == 8
    assert 'fill-opacity="1.000"' in found["layer 1, head 0: 1"]
    assert 'fill-opacity="0.500"' in found["layer 0, head 1: 0.5"]
    assert 'class="cold"' in found["layer 0, head 2: −0.25"]
    assert 'fill-opacity="0.250"' in found["layer 0, head 2: −0.25"]
    assert "fill-opacity" not in found["layer 0, head 3: no value"]


def test_standard_errors_are_said():
    page = render_scores(heads(standard_error=torch.full((2, 4), 0.02)))
    assert "layer 1, head 0: 1 ± 0.02" in cells(page)
    assert "standard error" in page


def test_the_negative_half_of_the_scale_is_there_only_when_needed():
    assert 'class="cold" aria-hidden' in render_scores(heads())
    assert 'class="cold" aria-hidden' not in render_scores(heads(((1.0, 0, 0, 0),) * 2))


def test_all_zero_and_all_missing_measurements_are_drawn():
    assert 'fill-opacity="0.000"' in render_scores(heads(((0.0,) * 4,) * 2))
    page = render_scores(heads(((NAN,) * 4,) * 2))
    assert "2 × 4 values (layer × head): none." in page


def test_patching_has_one_map_per_kind_with_tokens_as_columns():
    seen = views(patching())
    assert [view.title for view in seen.maps] == ["residual_patching: attn", "residual_patching: mlp"]
    assert torch.equal(seen.maps[1].values, patching().values[..., 1])
    assert list(seen.maps[0].columns) == ["<s>", " The", "⏎"]
    page = render_scores(patching())
    assert "layer 1, position 1 “ The”: 0.8" in cells(page)
    assert "&lt;s&gt;" in page
    assert "<s>" not in page.split("</style>")[1].replace("&lt;s&gt;", "")


def test_a_timeline_is_lines_and_coloured_text():
    seen = views(timeline())
    assert [view.y_name for view in seen.lines] == ["waad", "fai"]
    page = render_scores(timeline())
    assert 'data-say="2: 2"' in page
    assert 'class="no" data-say="0: no value"' in page
    assert 'style="--v:50%" data-say="1: 1"' in page


def test_the_line_is_broken_where_there_is_no_value():
    values = torch.tensor([[0.0, 1.0, NAN, 1.0, 0.0]])
    page = render_scores(Scores(values, ("kind", "position"), "x", MODEL, labels={"kind": ("waad",)}))
    assert len(re.findall(r'<path class="line"', page)) == 2


def test_the_ablation_curve_begins_intact_and_has_the_band_of_all_draws():
    (view,) = views(heads(), curve=CURVE).lines
    best, random, worst = view.lines
    assert (best.x, best.y) == ([0, 1, 2], [1.0, 0.5, 0.0])
    assert (random.y, random.low, random.high) == ([1.0, 0.9, 0.5], [1.0, 0.8, 0.1], [1.0, 1.0, 0.9])
    assert worst.y == [1.0, 1.0, 1.0]
    assert view.level == (1.0, "intact")
    assert "random others, heads taken away 2: 0.5 (0.1 to 0.9)" in render_scores(heads(), curve=CURVE)


def test_the_loss_of_a_learned_measurement_is_drawn():
    seen = views(heads(extras={"loss": torch.tensor([[3.0, 0.5], [1.0, 0.4]])}))
    assert [(view.y_name, list(view.lines[0].y)) for view in seen.lines] == [
        ("loss", [3.0, 1.0]), ("penalty", pytest.approx([0.5, 0.4])),
    ]  # fmt: skip


def test_the_scatter_pairs_units_that_both_have_and_says_pearsons_r():
    other = heads(((0.0, 1.0, -0.5, 7.0), (2.0, 0.2, 0.4, 0.6)), scorer="semantic_retrieval")
    (view,) = views(heads(), compare=other).scatters
    assert len(view.points) == 7
    assert (1.0, 0.5, "layer 0, head 1") in view.points
    assert view.words.startswith("Pearson r = 1.000, rank correlation 1.000")
    assert view.x_name == "semantic_retrieval"


def test_a_measurement_of_other_units_is_refused():
    with pytest.raises(ScoresMismatchError):
        render_scores(heads(), compare=patching())


def test_units_are_named():
    assert unit_name(heads(), (1, 2)) == "layer 1, head 2"
    assert unit_name(patching(), (0, 2, 1)) == "layer 0, position 2 “⏎”, mlp"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 8, [0, 2, 4, 6, 8]), (-1, 1, [-1, -0.5, 0, 0.5, 1]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_hostile_name_stays_text():
    evil = "<script>alert(1)</script>"
    page = render_scores(heads(scorer=evil, notes=(evil,), data={evil: evil}), command=evil)
    assert evil not in page
    assert page.count("<script") == 2  # the data and the page's own


def test_the_page_is_self_contained_and_repeatable():
    page = render_scores(patching())
    assert page == render_scores(patching())
    assert not re.search(r'(src|href)="(?!data:|#)', page)


@pytest.mark.parametrize("scores", [heads(), patching(), timeline()], ids=lambda s: s.scorer)
def test_the_picture(scores, tmp_path):
    matplotlib = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed (the extra `plots`)")
    target = tmp_path / "new" / "scores.png"
    assert save_png(scores, target, curve=CURVE) == target
    picture = matplotlib.imread(target)
    assert min(picture.shape[:2]) > 300
    assert picture[..., :3].std() > 0.05  # not one colour
    assert list(target.parent.iterdir()) == [target]


def test_the_picture_shows_the_sign_by_colour(tmp_path):
    matplotlib = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed (the extra `plots`)")
    blue, red = (
        matplotlib.imread(save_png(heads(((v,) * 4,) * 2), tmp_path / f"{v}.png"))[..., :3].reshape(-1, 3).mean(0)
        for v in (1.0, -1.0)
    )
    assert blue[2] > blue[0]
    assert red[0] > red[2]


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"sparing\[plots\]"):
        save_png(heads(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_a_named_error(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `plots`)")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_png(heads(), tmp_path / "file" / "a.png")

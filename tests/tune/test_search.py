"""The search on a planted model: what is best is known, and so is who may read which context."""

from __future__ import annotations

from collections import Counter

import pytest

from sparing.compare.cells import GATE, Cell, Contestant
from sparing.errors import InvalidInputError, MethodRefusedError
from sparing.loading import ModelSpec
from sparing.tasks import Interval, registry
from sparing.tune import tuner
from sparing.tune.page import pareto, render_tuning
from sparing.tune.request import Request
from sparing.tune.search import Search
from sparing.tune.space import DENSE, OWN, PREFILLS, Space, default_methods, with_field
from sparing.tune.standing import Standing
from sparing.tune.words import verdict
from tests.tune.planted import FULL_BYTES, PlantedObserver, share_of

pytest.importorskip("optuna", reason="the extra sparing[tune] is not installed")
METHODS = ["kvzip", "snapkv", "tova", "knorm"]
TASKS = [("needle_single", registry.get("needle_single")), ("kv_retrieval", registry.get("kv_retrieval"))]


@pytest.fixture(name="tuned")
def tune_planted(monkeypatch, tmp_path):
    monkeypatch.setattr(tuner, "Observer", PlantedObserver)

    def run(request, methods=METHODS, **options):
        options = {"samples": 36, "trials": 40, "lengths": (64,)} | options
        return tuner.tune(ModelSpec(), TASKS, request, tmp_path, methods=methods, **options)

    yield run
    monkeypatch.setattr(PlantedObserver, "full_score", 1.0)


@pytest.fixture(name="searching")
def search_planted(tmp_path):
    """A search on its way, with eighteen contexts of one cell."""

    def make(request, methods):
        cells = [Cell(TASKS[0][1], "query-agnostic", 64, tuple(range(18)))]
        observer = PlantedObserver(ModelSpec(), cells, 0, tmp_path)
        space = Space(methods, request, 16, FULL_BYTES)
        return Search(observer, request, space, {0: cells[0].contexts}, 1, 0, lambda *told: None)

    return make


def standing_of(contestant, loss):
    interval = Interval(loss, loss, loss, 18)
    return Standing(contestant, interval, (loss, "task"), 1 - loss, 1.0, 0.1, 100, 0.01, 1.0, [])


def test_the_planted_best_is_found_and_is_small(tuned):
    """kvzip loses nothing from keep 0.2 on, and codes of 4 bits hold 27.5 % of that: 5.5 % of the bytes."""
    outcome = tuned(Request(max_loss=0.02))
    best = outcome.finalists[0][1]
    assert best.contestant.name.startswith("kvzip")
    assert best.loss.mean <= 0.02
    assert 0.04 < best.share < 0.09
    assert outcome.recipe.text == best.contestant.name


def test_within_a_memory_the_least_loss_is_chosen(tuned):
    outcome = tuned(Request(memory=0.3))
    assert outcome.finalists[0][1].share <= 0.3
    assert outcome.finalists[0][1].loss.mean == 0


def test_a_limit_in_bytes_gives_a_budget_in_bytes(tuned):
    outcome = tuned(Request(bytes=FULL_BYTES // 4))
    assert str(outcome.recipe.keep).endswith("B")
    assert outcome.finalists[0][1].bytes_kept <= FULL_BYTES // 4


def test_a_limit_in_time_is_met_by_holding_less(tuned):
    """Planted: 10 ms a token, and 20 more for a full cache."""
    outcome = tuned(Request(latency=0.015, max_loss=0.02))
    assert outcome.finalists[0][1].decode_s <= 0.015


def test_held_out_contexts_are_read_by_finalists_only(tuned):
    outcome = tuned(Request(max_loss=0.02))
    observer = PlantedObserver.made
    readers = {contestant for contestant, _, index in observer.reads if index >= 18}
    assert readers == {GATE, *(held.contestant for _, held in outcome.finalists)}
    assert len(outcome.finalists) == 3
    for _, held in outcome.finalists:
        assert held.n == 18


def test_few_candidates_read_all_contexts(tuned):
    outcome = tuned(Request(max_loss=0.02))
    reads = Counter(contestant for contestant, _, index in PlantedObserver.made.reads if index < 18)
    candidates = [contestant for contestant in reads if contestant != GATE]
    everything = [contestant for contestant in candidates if reads[contestant] == 36]
    assert len(candidates) > 35
    assert len(everything) < len(candidates) / 2
    # knorm loses at least three quarters, which a few contexts make certain.
    assert max(count for contestant, count in reads.items() if contestant.name.startswith("knorm")) < 36
    assert any("loses at least" in reason for each, reason in outcome.dropped if each.contestant.name == "knorm")


def test_nobody_who_was_refused_reads(tuned):
    tuned(Request(max_loss=0.02))
    assert not any(contestant.name.startswith("tova") for contestant, _, _ in PlantedObserver.made.reads)


def test_who_was_refused_is_said_once(tuned):
    outcome = tuned(Request(max_loss=0.02))
    assert [str(error) for error in outcome.refused if error.method == "tova"] == ["tova: is refused here"]
    assert verdict(outcome).count("Left out: tova: is refused here.") == 1
    assert "Left out: tova: is refused here." in render_tuning(outcome, "sparing tune", {})


def test_methods_that_are_all_refused_are_an_error(tuned):
    with pytest.raises(MethodRefusedError, match="tova: is refused here"):
        tuned(Request(max_loss=0.02), methods=["tova"])


def test_larger_sizes_are_tried_of_the_methods_that_lose_least(searching):
    """The best size of a text counts: kvzip was also tried at a size at which it loses most of all."""
    search = searching(Request(memory=0.01, max_loss=0.01), METHODS)
    tried = [("kvzip", 0.1, 0.1), ("kvzip", 0.01, 0.9), ("snapkv", 0.1, 0.2), ("snapkv+global", 0.1, 0.3),
             ("knorm", 0.1, 0.4)]  # fmt: skip
    search.finished = [standing_of(Contestant(name, keep), loss) for name, keep, loss in tried]
    search.relax()
    read = {contestant.name for contestant, _, _ in PlantedObserver.made.reads}
    assert read == {"full", "kvzip", "snapkv", "snapkv+global"}
    assert Contestant("kvzip", 0.8) in [each.contestant for each in search.finished]


def test_proposals_that_become_one_candidate_get_its_value_and_it_is_read_once(searching):
    search = searching(Request(memory=0.1), ["kvzip"])
    twice = [Contestant("kvzip", 0.2), Contestant("kvzip", 0.3)]
    values = search.generation(twice)
    made = Contestant("kvzip", 0.098)
    assert values == dict.fromkeys(twice, search.value(search.finished[0]))
    assert [each.contestant for each in search.finished] == [made]
    assert search.generation([Contestant("kvzip", 0.25)]) == {Contestant("kvzip", 0.25): values[twice[0]]}
    assert [each.contestant for each in search.finished] == [made], "known already"


def test_nothing_meets_the_request_and_what_would_is_said(tuned):
    outcome = tuned(Request(memory=0.1, max_loss=0.01), methods=["snapkv"])
    assert outcome.recipe is None
    said = " ".join(verdict(outcome))
    assert "Nothing that was tried meets the request (at most 10 % of the cache's bytes, a loss of at most 1 %)" in said
    assert "What would lose so little: snapkv" in said
    enough = min((each for each in outcome.searched if each.loss.mean <= 0.01), key=lambda each: each.share)
    assert 0.12 < enough.share <= 0.8, "snapkv needs half of the cache, an eighth of it in codes of 4 bits"
    assert "What loses least within the other limits" in said


def test_a_full_cache_that_meets_the_request_alone_is_said(tuned):
    """Planted: everybody reads a prompt in half a second; what knorm holds answers little."""
    outcome = tuned(Request(first_token=0.6, max_loss=0.01), methods=["knorm"])
    assert outcome.recipe is None
    assert verdict(outcome)[0].startswith("Run the model as it is")
    dense = [each.contestant for each in outcome.searched if "&" not in each.contestant.name]
    assert not any(each.keep == 1.0 and "bits=" not in each.name for each in dense), "the full cache by another name"


def test_a_full_cache_that_cannot_do_it_is_said(tuned, monkeypatch):
    monkeypatch.setattr(PlantedObserver, "full_score", 0.4)
    with pytest.raises(InvalidInputError, match=r"0\.40 on needle_single@64, 0\.40 on kv"):
        tuned(Request(max_loss=0.02))
    assert tuned(Request(max_loss=0.02), gate=0.4).recipe is not None


def test_a_cell_below_the_gate_counts_in_nothing(tuned, monkeypatch):
    get = PlantedObserver.get

    def second_is_hard(self, contestant, cell, index):
        found = get(self, contestant, cell, index)
        return found if cell == 0 else type(found)(**vars(found) | {"scores": [0.0]})

    monkeypatch.setattr(PlantedObserver, "get", second_is_hard)
    outcome = tuned(Request(max_loss=0.02))
    assert [(cell.label, score) for cell, score in outcome.left_out] == [("kv_retrieval@64", 0.0)]
    assert [row["task"] for row in outcome.finalists[0][1].rows] == ["needle_single"]
    assert "kv_retrieval@64 was left out: the full cache itself scores 0.00 there." in verdict(outcome)


def test_the_same_seed_finds_the_same(tuned):
    first, second = (tuned(Request(max_loss=0.02)) for _ in range(2))
    assert [held.contestant for _, held in first.finalists] == [held.contestant for _, held in second.finalists]


@pytest.mark.parametrize("options", [{"samples": 3}, {"gate": 1.5}, {"trials": 0}])
def test_numbers_that_cannot_be(tuned, options):
    with pytest.raises(InvalidInputError):
        tuned(Request(memory=0.5), **options)


def test_the_page_shows_what_was_found_and_runs_nothing_of_the_users(tuned):
    outcome = tuned(Request(memory=0.3, max_loss=0.02))
    page = render_tuning(outcome, "sparing tune <script>", {"Model": "<b>planted"})
    assert page == render_tuning(outcome, "sparing tune <script>", {"Model": "<b>planted"})
    assert "<script>alert" not in page
    assert "&lt;b&gt;planted" in page
    for _, held in outcome.finalists:
        assert held.label in page
    assert page.count('class="ci"') >= 3
    assert f"All {len(outcome.searched) + len(outcome.dropped)} candidates" in page


def test_the_front_is_what_no_other_beats(tuned):
    outcome = tuned(Request(max_loss=0.3))
    front = pareto(outcome.searched)
    assert front
    for each in front:
        assert not any(other.share <= each.share and other.loss.mean < each.loss.mean for other in outcome.searched), (
            "beaten"
        )
    assert [each.share for each in front] == sorted(each.share for each in front)


# -- the space ---------------------------------------------------------------------------------------------------------


def test_what_a_method_takes_is_found_out():
    space = Space(["snapkv", "quest"], Request(memory=0.5), 16, FULL_BYTES)
    assert space.allocators["snapkv"] == [OWN, "adaptive", "global", "pyramid", "uniform"]
    assert space.bits["snapkv"] == [16, 8, 4]
    assert space.allocators["quest"] == [OWN], "it drops nothing, so nothing is spread"
    assert space.bits["quest"] == [16], "codes can't be read in parts"


def test_how_prompts_are_read_is_searched_for_methods_that_leave_it_open():
    methods = ["snapkv", "xattention", "xattention & snapkv", "spatten"]
    space = Space(methods, Request(first_token=2.0), 16, FULL_BYTES)
    assert space.prefills == {"snapkv": list(PREFILLS), **{text: [DENSE] for text in methods[1:]}}
    assert Space(methods, Request(memory=0.5), 16, FULL_BYTES).prefills["snapkv"] == [DENSE]


def test_what_a_method_with_a_draft_takes_is_found_out_without_the_draft():
    text = "speckv(draft=no/such/model)"
    space = Space([text], Request(memory=0.5), 16, FULL_BYTES)
    assert "adaptive" in space.allocators[text]
    assert space.bits[text] == [16, 8, 4]


def test_the_full_cache_by_another_name():
    for limits, whole, half in (({"memory": 0.5}, 1.0, 0.5), ({"bytes": 10}, "1000000B", "500000B")):
        space = Space(["snapkv"], Request(**limits), 16, FULL_BYTES)
        assert space.is_full(Contestant("snapkv", whole))
        assert not space.is_full(Contestant("snapkv", half))
        assert not space.is_full(Contestant("snapkv(bits=4)", whole))


def test_codes_leave_room_for_more_tokens():
    space = Space(["snapkv"], Request(memory=0.25), 16, FULL_BYTES)
    exact, coded = space.candidate("snapkv", 0.25), space.candidate("snapkv", 0.25, bits=4)
    assert (exact.keep, coded) == (0.25, Contestant("snapkv(bits=4)", 0.8))
    assert share_of(coded) < 0.25
    assert space.resized(exact, 0.5) == Contestant("snapkv", 0.125)
    in_bytes = Space(["snapkv"], Request(bytes=250_000), 16, FULL_BYTES)
    assert in_bytes.resized(in_bytes.candidate("snapkv", 0.25), 0.5) == Contestant("snapkv", "125000B")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("snapkv", "snapkv(bits=4)"),
        ("snapkv(window=16)", "snapkv(window=16, bits=4)"),
        ("snapkv+adaptive(floor=0.1)", "snapkv(bits=4)+adaptive(floor=0.1)"),
        ("xattention(keep=0.5) & snapkv", "xattention(keep=0.5) & snapkv(bits=4)"),
    ],
)
def test_a_field_goes_to_the_last_method(text, expected):
    from sparing.core.parsing import parse_method

    assert with_field(text, "bits=4").replace("& ", "&").replace("&", "& ") == expected
    assert parse_method(with_field(text, "bits=4")).code_bits == 4


def test_what_is_searched_by_default_needs_nothing():
    names = default_methods()
    assert {"snapkv", "kvzip", "adakv"} <= set(names)
    assert not {"duo", "speckv", "random", "xattention"} & set(names)

"""Reading, scoring and choosing among the texts of a corpus, against sums by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparing.adapters.lens import ModelLens
from sparing.compare.store import read_rows
from sparing.core.scores import ModelIdentity, Scores
from sparing.corpus import read_records, score_corpus, select_top
from sparing.errors import InputFileError, InvalidInputError, OutputError, ScoresMismatchError
from sparing.loading import ModelSpec
from sparing.models import resolve
from tests.corpus.by_hand import losses

HEADS = ((2, 0), (2, 1))
SIZES = {"top": 2, "max_tokens": 48, "batch_tokens": 96}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bundled():
    return AutoModelForCausalLM.from_pretrained(resolve("bundled")).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve("bundled"))


@pytest.fixture(scope="module")
def heads(bundled):
    """Scores whose two best heads are HEADS."""
    values = torch.zeros(4, 4)
    for head in HEADS:
        values[head] = 1.0
    return Scores(values, ("layer", "head"), "by hand", ModelLens(bundled).identity)


def texts(count):
    """Of several lengths, each with something said twice: what copy heads are for."""
    return [f"The special magic number for river {i} is: {48213 + 7 * i}. " * (1 + i % 4) for i in range(count)]


@pytest.fixture
def corpus(tmp_path):
    """Two shards of different domains, one of them named in its rows, 10 texts each."""
    write(tmp_path / "data" / "b-web.jsonl", [{"text": text} for text in texts(10)])
    math_rows = [{"text": f"Lemma. {text}", "id": f"m{i}", "domain": "math"} for i, text in enumerate(texts(10))]
    write(tmp_path / "data" / "a-other.jsonl", math_rows)
    return tmp_path / "data"


# -- reading -----------------------------------------------------------------------------------------------------------


def test_records_of_a_folder_and_of_files(tmp_path):
    first = write(tmp_path / "in" / "code-1.jsonl", [{"text": "x = 1", "stars": 5}, {"text": "y", "id": 7}])
    write(tmp_path / "in" / "a.jsonl", [{"text": "ähnlich", "domain": "web"}])
    (tmp_path / "in" / "notes.txt").write_text("no shard")
    found = [(r.id, r.domain, r.text) for r in read_records([tmp_path / "in"])]
    assert found == [("a.jsonl:1", "web", "ähnlich"), ("code-1.jsonl:1", "code-1", "x = 1"), ("7", "code-1", "y")]
    assert [r.domain for r in read_records([first], domain="all")] == ["all", "all"]
    assert next(iter(read_records([first]))).row == {"text": "x = 1", "stars": 5}


def test_empty_lines_are_passed_over_and_counted(tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text('\n{"text": "a"}\n  \n{"text": ""}')
    assert [(r.id, r.text) for r in read_records([path])] == [("web.jsonl:2", "a"), ("web.jsonl:4", "")]


def test_lines_are_read_as_they_are_needed(tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text('{"text": "a"}\n{torn')
    records = read_records([path])
    assert next(records).text == "a"
    with pytest.raises(InputFileError, match="line 2"):
        next(records)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{half", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1, 2]", "has no text"),
        ('{"txt": "a"}', "has no text"),
        ('{"text": 5}', "has no text"),
    ],
)
def test_bad_lines_are_named_with_file_and_line(line, problem, tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputFileError, match=rf"web\.jsonl: line 2 {problem}"):
        list(read_records([path]))


def test_what_is_no_corpus_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for missing in ("missing.jsonl", "empty"):
        with pytest.raises(InputFileError, match=missing):
            list(read_records([tmp_path / missing]))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "ähnlich"}\n'.encode("latin-1"))
    with pytest.raises(InputFileError, match=r"latin\.jsonl: is no UTF-8"):
        list(read_records([latin]))


# -- scoring -----------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_loss_is_by_hand(bundled, tokenizer, heads, corpus, tmp_path):
    """One text at a time, without padding, with the two heads' attention written out as an average."""
    assert score_corpus(ModelSpec(), heads, [corpus], tmp_path / "out", **SIZES) == 20
    rows = {(row["domain"], row["id"]): row for row in read_rows(tmp_path / "out")}
    assert len(rows) == 20
    for record in read_records([corpus]):
        row = rows[record.domain, record.id]
        ids = tokenizer.encode(record.text)[: SIZES["max_tokens"]]
        base, reference = losses(bundled, ids, HEADS)
        assert row["tokens"] == len(ids)
        # The model is float32 and its batches are padded: sums in another order.
        assert row["base_loss"] == pytest.approx(base, rel=1e-4)
        assert row["reference_loss"] == pytest.approx(reference, rel=1e-4)
        assert row["score"] == pytest.approx((reference - base) / base, abs=1e-3)
    assert max(row["score"] for row in rows.values()) > 0.05, "the heads matter somewhere"


def test_texts_that_say_nothing_score_nothing(heads, tmp_path):
    data = write(tmp_path / "web.jsonl", [{"text": ""}, {"text": "a"}, {"text": "a longer text of some words"}])
    assert score_corpus(ModelSpec(), heads, [data], tmp_path / "out", **SIZES) == 3
    rows = {row["id"]: row for row in read_rows(tmp_path / "out")}
    empty = rows["web.jsonl:1"]
    assert (empty["score"], empty["base_loss"]) == (0.0, 0.0)
    assert empty["tokens"] == 1, "the beginning of text only"
    assert all(math.isfinite(row["score"]) for row in rows.values())
    assert rows["web.jsonl:3"]["base_loss"] > 0


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7])
def test_an_interrupted_run_goes_on_where_it_was(after, heads, corpus, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    score_corpus(ModelSpec(), heads, [corpus], whole, **SIZES)

    def stop(done, what):
        if done >= after:
            raise Interrupted

    with pytest.raises(Interrupted):
        score_corpus(ModelSpec(), heads, [corpus], tmp_path / "out", **SIZES, progress=stop)
    kept = read_rows(tmp_path / "out")
    assert after <= len(kept) < 20
    told = []
    now = score_corpus(ModelSpec(), heads, [corpus], tmp_path / "out", **SIZES, progress=lambda n, what: told.append(n))
    assert now == 20 - len(kept) == told[-1]
    rows = read_rows(tmp_path / "out")
    assert rows[: len(kept)] == kept
    assert sorted(rows, key=lambda r: r["key"]) == sorted(read_rows(whole), key=lambda r: r["key"])
    assert score_corpus(ModelSpec(), heads, [corpus], tmp_path / "out", **SIZES) == 0
    assert read_rows(tmp_path / "out") == rows


def test_a_batch_that_was_half_written_gives_the_same_rows(heads, corpus, tmp_path):
    """A process killed between two rows of one batch: the batch is read again as a whole, its rows are not doubled."""
    score_corpus(ModelSpec(), heads, [corpus], tmp_path / "out", **SIZES)
    file = tmp_path / "out" / "results.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # torn within the last row
    assert score_corpus(ModelSpec(), heads, [corpus], tmp_path / "out", **SIZES) == 1
    assert file.read_bytes() == whole


def test_a_corpus_that_has_grown_is_scored_on(heads, corpus, tmp_path):
    score_corpus(ModelSpec(), heads, [corpus], tmp_path / "out", **SIZES)
    write(corpus / "c-new.jsonl", [{"text": text} for text in texts(3)])
    assert score_corpus(ModelSpec(), heads, [corpus], tmp_path / "out", **SIZES) == 3


@pytest.mark.parametrize(
    "change", [{"top": 1}, {"max_tokens": 32}, {"batch_tokens": 64}, {"dtype": "bfloat16"}], ids=lambda c: next(iter(c))
)
def test_other_settings_are_refused_and_change_nothing(change, heads, corpus, tmp_path):
    change = dict(change)
    score_corpus(ModelSpec(), heads, [corpus], tmp_path / "out", **SIZES)
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    spec = ModelSpec(dtype=change.pop("dtype", "auto"))
    with pytest.raises(OutputError, match="other settings"):
        score_corpus(spec, heads, [corpus], tmp_path / "out", **(SIZES | change))
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_one_id_twice_in_a_domain_is_refused(heads, tmp_path):
    data = write(tmp_path / "web.jsonl", [{"text": "a b", "id": 1}, {"text": "c d", "id": 1}])
    with pytest.raises(InvalidInputError, match="ids that differ"):
        score_corpus(ModelSpec(), heads, [data], tmp_path / "out", **SIZES)
    rows = [{"text": "a b", "id": 1, "domain": "x"}, {"text": "c d", "id": 1, "domain": "y"}]
    assert score_corpus(ModelSpec(), heads, [write(data, rows)], tmp_path / "fine", **SIZES) == 2


def test_heads_and_numbers_that_do_not_fit_are_refused(heads, corpus, tmp_path):
    other = ModelIdentity("other", heads.model.architecture, 5, 4, 2, heads.model.head_dim, "")
    foreign = Scores(torch.rand(5, 4), ("layer", "head"), "by hand", other)
    with pytest.raises(ScoresMismatchError, match="5 attention layers"):
        score_corpus(ModelSpec(), foreign, [corpus], tmp_path / "out", **SIZES)
    layers = Scores(torch.rand(4), ("layer",), "by hand", heads.model)
    with pytest.raises(ScoresMismatchError, match="layer × head"):
        score_corpus(ModelSpec(), layers, [corpus], tmp_path / "out", **SIZES)
    for change in ({"max_tokens": 1}, {"batch_tokens": 47}, {"top": 0}, {"top": 1.5}):
        with pytest.raises(InvalidInputError):
            score_corpus(ModelSpec(), heads, [corpus], tmp_path / "out", **(SIZES | change))


# -- choosing ----------------------------------------------------------------------------------------------------------


def scored(folder, rows):
    """A folder as score_corpus leaves it, with scores and lengths of our own, and its corpus."""
    from sparing.compare.store import row_key

    data = write(folder / "data.jsonl", [{"text": "t", "id": row["id"], "domain": row["domain"]} for row in rows])
    keys = [row_key({"domain": row["domain"], "id": str(row["id"])}) for row in rows]
    write(folder / "out" / "results.jsonl", [row | {"key": key} for row, key in zip(rows, keys, strict=True)])
    return data, folder / "out"


def row(number, domain, score, tokens=10):
    return {"id": str(number), "domain": domain, "score": score, "tokens": tokens}


def chosen(out):
    return [json.loads(line) for line in (out / "selected.jsonl").read_text("utf-8").splitlines()]


def test_the_best_fifth_of_every_domain(tmp_path):
    """Ten texts of "web" and five of "math": two and one; a domain of low scores is not left out."""
    rows = [row(i, "web", 100 + i) for i in range(10)] + [row(i, "math", i / 10) for i in range(5)]
    data, out = scored(tmp_path, rows)
    parts = select_top([data], out)
    assert [(p["domain"], p["id"], p["influence"]) for p in chosen(out)] == [
        ("web", "8", 108), ("web", "9", 109), ("math", "4", 0.4),
    ]  # fmt: skip
    assert [(p.domain, p.texts, p.chosen) for p in parts] == [("math", 5, 1), ("web", 10, 2)]
    assert parts[1].score == pytest.approx(104.5)
    assert parts[1].chosen_score == pytest.approx(108.5)
    assert [path.name for path in out.iterdir() if "part" in path.name] == []


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.2, 2), (0.25, 3), (1.0, 10)])
def test_shares_are_rounded_up(share, count, tmp_path):
    data, out = scored(tmp_path, [row(i, "web", i) for i in range(10)])
    assert select_top([data], out, share=share)[0].chosen == count == len(chosen(out))


def test_length_matched_texts_are_as_long_as_all_are(tmp_path):
    """Scores that grow with length: the plain choice is long, the matched one has the best of each tenth."""
    rows = [row(i, "web", i, tokens=10 * (i + 1)) for i in range(100)]
    data, out = scored(tmp_path, rows)
    plain = select_top([data], out)[0]
    assert plain.tokens == pytest.approx(505)
    assert plain.chosen_tokens == pytest.approx(905)  # texts 80 to 99
    matched = select_top([data], out, length_matched=True)[0]
    assert matched.chosen == 20
    assert {int(p["id"]) for p in chosen(out)} == {10 * b + i for b in range(10) for i in (8, 9)}
    assert matched.chosen_tokens == pytest.approx(545)  # 40 above the mean: within a tenth, not across


def test_equal_scores_are_chosen_alike_whatever_their_order(tmp_path):
    rows = [row(i, "web", 1.0) for i in range(10)]
    found = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        data, out = scored(tmp_path / name, order)
        select_top([data], out)
        found.append({p["id"] for p in chosen(out)})
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_choosing_what_was_not_scored_is_refused_and_leaves_the_earlier_choice(tmp_path):
    data, out = scored(tmp_path, [row(i, "web", i) for i in range(5)])
    select_top([data], out)
    before = chosen(out)
    write(data, [{"text": "t", "id": i, "domain": "web"} for i in range(6)])
    with pytest.raises(InputFileError, match="no score for 5"):
        select_top([data], out)
    assert chosen(out) == before
    assert sorted(path.name for path in out.iterdir()) == ["results.jsonl", "selected.jsonl"]
    for share in (0, -0.1, 1.1, math.nan):
        with pytest.raises(InvalidInputError, match="share"):
            select_top([data], out, share=share)


def test_from_texts_to_a_choice(heads, corpus, tmp_path):
    score_corpus(ModelSpec(), heads, [corpus], tmp_path / "out", **SIZES)
    parts = select_top([corpus], tmp_path / "out", share=0.3)
    assert [(p.domain, p.texts, p.chosen) for p in parts] == [("b-web", 10, 3), ("math", 10, 3)]
    rows = {(r["domain"], r["id"]): r["score"] for r in read_rows(tmp_path / "out")}
    for domain in ("b-web", "math"):
        best = sorted((score for (d, _), score in rows.items() if d == domain), reverse=True)[:3]
        mine = [p["influence"] for p in chosen(tmp_path / "out") if p.get("domain", "b-web") == domain]
        assert sorted(mine, reverse=True) == best

"""The model type `sparing` of the harness: without a method its `hf`; with one, what sparing itself says."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import sparing
from sparing.compare.engine import FULL, Engine
from sparing.core.method import Method
from sparing.errors import (
    InputFileError,
    InvalidInputError,
    MethodRefusedError,
    UnknownNameError,
    UnsupportedModelError,
)
from sparing.lm_eval import __main__ as command
from sparing.lm_eval.model import SparingLM
from sparing.loading import ModelSpec
from sparing.recipe import Recipe
from sparing.tasks import registry

METHOD = "snapkv(window=8,kernel_size=5)"
KEEP = 0.25
SNAPKV = sparing.SnapKV(keep=KEEP, window=8, kernel_size=5)


@pytest.fixture(scope="module")
def loaded():
    """The bundled model in float64, so that equal means equal."""
    made = ModelSpec("bundled", "float32", "cpu").load()
    return replace(made, model=made.model.double())


def prompts(tokenizer, count=5):
    """Contexts of different lengths with a question, and the answers."""
    found = []
    for index in range(count):
        sample = registry.get("needle_single").sample(tokenizer, 260 + 30 * index, 0, index)
        question = sample.questions[0]
        found.append((tokenizer.decode(sample.context_ids[1:]) + question.text, question.answers[0]))
    return found


def asking(tokenizer, **options):
    """Requests for answers, in an order that is not that of their lengths."""
    options = {"until": [".\n", "\n"], "max_gen_toks": 12} | options
    return [Instance("generate_until", {}, (text, options), n) for n, (text, _) in enumerate(prompts(tokenizer))]


def scoring(tokenizer):
    """Requests for likelihoods: choices on one context, of one token and of many; one without any context."""
    pairs = [(text, end) for text, answer in prompts(tokenizer) for end in (f" {answer}", " nothing at all", " x")]
    return [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate([*pairs, ("", " and so on")])]


def lm(loaded, method=None, batch_size=3, **options):
    return SparingLM(loaded.model, method=method, tokenizer=loaded.tokenizer, batch_size=batch_size, **options)


def theirs(loaded, batch_size=3, **options):
    return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, **options)


def close(mine, others):
    """Log-likelihoods in float64: a sum of some ten terms that differ by the order of additions only."""
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in others]
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in others], rel=1e-9, abs=1e-9)


# -- without a method -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_without_a_method_answers_are_those_of_hf(loaded, batch_size):
    requests = asking(loaded.tokenizer)
    answers = lm(loaded, batch_size=batch_size).generate_until(requests, disable_tqdm=True)
    assert answers == theirs(loaded, batch_size).generate_until(requests, disable_tqdm=True)
    assert any("\n" not in answer and answer for answer in answers)


def test_sampling_is_the_tasks(loaded):
    requests = asking(loaded.tokenizer, do_sample=True, temperature=2.0)
    torch.manual_seed(7)
    answers = lm(loaded).generate_until(requests, disable_tqdm=True)
    torch.manual_seed(7)
    assert answers == theirs(loaded).generate_until(requests, disable_tqdm=True)
    assert answers != lm(loaded).generate_until(asking(loaded.tokenizer), disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_without_a_method_likelihoods_are_those_of_hf(loaded, batch_size):
    requests = scoring(loaded.tokenizer)
    mine = lm(loaded, batch_size=batch_size).loglikelihood(requests, disable_tqdm=True)
    close(mine, theirs(loaded, batch_size).loglikelihood(requests, disable_tqdm=True))


def test_what_does_not_fit_is_cut_as_hf_cuts_it(loaded):
    requests = scoring(loaded.tokenizer)[:6]
    mine = lm(loaded, max_length=200).loglikelihood(requests, disable_tqdm=True)
    close(mine, theirs(loaded, max_length=200).loglikelihood(requests, disable_tqdm=True))
    whole = lm(loaded).loglikelihood(requests, disable_tqdm=True)
    assert mine[0][0] != pytest.approx(whole[0][0], rel=1e-3)


def test_rolling_likelihoods_are_those_of_hf_and_refused_where_they_would_mean_nothing(loaded):
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), n) for n, (text, _) in enumerate(prompts(loaded.tokenizer, 2))
    ]
    mine = lm(loaded, max_length=200).loglikelihood_rolling(requests, disable_tqdm=True)
    assert mine == theirs(loaded, max_length=200).loglikelihood_rolling(requests, disable_tqdm=True)
    with pytest.raises(MethodRefusedError, match="no context to compress"):
        lm(loaded, SNAPKV).loglikelihood_rolling(requests, disable_tqdm=True)


# -- with one -------------------------------------------------------------------------------------------------------


def test_answers_are_what_sparing_generates_prompt_by_prompt(loaded):
    requests = asking(loaded.tokenizer)
    answers = lm(loaded, SNAPKV).generate_until(requests, disable_tqdm=True)
    assert answers != lm(loaded).generate_until(requests, disable_tqdm=True)
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([loaded.tokenizer.encode(request.args[0])])
        with sparing.use(loaded.model, SNAPKV):
            tokens = loaded.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert answer == loaded.tokenizer.decode(tokens, skip_special_tokens=True).split(".\n")[0].split("\n")[0]


METHODS = {
    "snapkv": SNAPKV,
    "adakv": sparing.parse_method("adakv", 0.25),
    "h2o": sparing.parse_method("h2o", 0.5),
    "kvzip": sparing.parse_method("kvzip", 0.5),
    "quest": sparing.parse_method("quest", 0.25),
    "tova": sparing.parse_method("tova", 64),
    "sparse": sparing.parse_method("a_shape(dispatch=always) & snapkv(window=8)", 0.5),
    "cascade": sparing.parse_method("spatten", 0.5),
    "shortened": None,  # needs a draft model
}


@pytest.mark.parametrize("name", METHODS)
def test_likelihoods_are_of_what_is_left(loaded, name):
    """By another way: a compressed context, to which the continuation is fed token by token, each prompt alone."""
    method = METHODS[name]
    if method is None:
        method = sparing.parse_method(
            "specpc(draft=copy) & snapkv(window=8)", 0.5, lambda _: copy.deepcopy(loaded.model)
        )
    requests = scoring(loaded.tokenizer)[:9]
    mine = lm(loaded, method, 1 if name == "kvzip" else 3).loglikelihood(requests, disable_tqdm=True)
    full = lm(loaded).loglikelihood(requests, disable_tqdm=True)
    expected = []
    with sparing.use(loaded.model, FULL) as session:
        engine = Engine(loaded, session)
        for text, end in (request.args for request in requests):
            context, whole = loaded.tokenizer.encode(text), loaded.tokenizer.encode(text + end)
            target = whole[len(context) :]
            cache = engine.compress(engine.read(context[:-1], [method]), method).cache
            expected.append(0.0)
            for fed, token in zip([context[-1], *target[:-1]], target, strict=True):
                with torch.inference_mode():
                    logits = loaded.model(torch.tensor([[fed]]), past_key_values=cache, use_cache=True).logits
                expected[-1] += float(logits[0, 0].log_softmax(-1)[token])
    assert [value for value, _ in mine] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    # One forward over both, or a first token predicted before anything is dropped, would give these.
    assert all(abs(a - b) > 1e-7 for (a, _), (b, _) in zip(mine, full, strict=True))


def test_a_method_that_takes_one_prompt_at_a_time_says_so(loaded):
    with pytest.raises(MethodRefusedError, match="batch_size=1"):
        lm(loaded, METHODS["kvzip"])


def test_what_was_held_is_told(loaded, caplog):
    made = lm(loaded, SNAPKV, batch_size=1)
    requests = asking(loaded.tokenizer)[:2]
    caplog.set_level(logging.INFO, "lm_eval.sparing")
    made.generate_until(requests, disable_tqdm=True)
    full, kept, plans = 0, 0, []
    for request in requests:
        with sparing.use(loaded.model, SNAPKV) as session:
            ids = torch.tensor([loaded.tokenizer.encode(request.args[0])])
            loaded.model.generate(ids, max_length=ids.shape[1] + 12, stop_strings="\n", tokenizer=loaded.tokenizer)
            full, kept = full + session.report().bytes_full, kept + session.report().bytes_kept
            plans.append(session.report().plan)
    facts = made.get_model_info()["sparing"]
    assert (facts["prompts"], facts["bytes_full"], facts["bytes_kept"]) == (2, full, kept)
    assert facts["share"] == kept / full < 0.4
    assert facts["method"] == repr(SNAPKV)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["token_share"] == sum(plan.tokens_kept for plan in plans) / sum(plan.tokens_seen for plan in plans)
    assert f"snapkv: 2 prompts, {kept:,} of {full:,} bytes" in caplog.text


def test_why_nothing_was_dropped_is_told(loaded):
    made = lm(loaded, SNAPKV)
    made.loglikelihood([Instance("loglikelihood", {}, ("a short text", " of words"), 0)], disable_tqdm=True)
    assert "1 times: nothing dropped: the prompt is shorter than min_prompt=32" in str(made.held)
    assert made.held.bytes_kept >= made.held.bytes_full


def test_what_is_read_in_part_is_told(loaded):
    made = lm(loaded, METHODS["quest"])
    made.generate_until(asking(loaded.tokenizer)[:1], disable_tqdm=True)
    assert 0.1 < made.held.facts()["read_share"] < 0.6
    assert "of what was held read by answers" in str(made.held)
    made = lm(loaded, METHODS["quest"])
    made.loglikelihood(scoring(loaded.tokenizer)[:4], disable_tqdm=True)
    assert 0.1 < made.held.facts()["read_share"] < 0.6
    made = lm(loaded, METHODS["sparse"])
    made.generate_until(asking(loaded.tokenizer)[:1], disable_tqdm=True)
    assert 0.1 < made.held.facts()["density"] < 1
    assert "of dense attention computed" in str(made.held)


def test_batch_size_auto(loaded):
    requests = scoring(loaded.tokenizer)[:4]
    made = lm(loaded, SNAPKV, batch_size="auto", max_batch_size=2)
    close(
        made.loglikelihood(requests, disable_tqdm=True), lm(loaded, SNAPKV).loglikelihood(requests, disable_tqdm=True)
    )


# -- arguments ------------------------------------------------------------------------------------------------------


def arguments(*typed):
    """What the harness's command makes of `--model_args`."""
    from lm_eval._cli import HarnessCLI

    parser = HarnessCLI()._parser
    return parser.parse_args(["run", "--model", "sparing", "--model_args", *typed]).model_args


@pytest.mark.parametrize(
    "typed",
    [
        (f"pretrained=bundled,method={METHOD},keep=0.25,dtype=float32,device=cpu",),
        ("pretrained=bundled", f"method={METHOD}", "keep=0.25", "dtype=float32", "device=cpu"),
        (json.dumps({"pretrained": "bundled", "method": METHOD, "keep": 0.25, "dtype": "float32", "device": "cpu"}),),
    ],
)
def test_a_method_with_fields_survives_the_command_line(typed):
    made = SparingLM.create_from_arg_obj(arguments(*typed), {"batch_size": 2, "max_batch_size": None, "device": None})
    assert made.method == SNAPKV
    assert made.batch_size == 2
    assert made.model.dtype == torch.float32


@pytest.mark.parametrize(("typed", "keep"), [("keep=0.25", 0.25), ("keep=64", 64), ("keep=64KiB", "64KiB"), ("", 0.5)])
def test_budgets_as_on_our_command_line(typed, keep):
    given = arguments(*filter(None, ("pretrained=bundled", "method=knorm", typed)))
    assert SparingLM(**given, device="cpu").method == sparing.Knorm(keep=keep)


def test_prompts_are_read_as_a_method_says(loaded):
    """Also where dense attention would be faster: that is what is evaluated."""
    assert lm(loaded, "block_top_k & snapkv").method.prefill.dispatch == "always"
    assert lm(loaded, "block_top_k").method.dispatch == "always"


def recipe(path: Path, method: Method = SNAPKV, text: str = METHOD, dtype: str = "float32") -> Recipe:
    spec = ModelSpec("bundled", dtype, "cpu")
    return Recipe(spec, spec.load().fingerprint, text, KEEP, repr(method)).save(path)


def test_a_recipe_says_model_and_method(tmp_path):
    recipe(tmp_path / "recipe.json")
    for given in ({}, {"pretrained": "bundled"}):
        made = SparingLM(recipe=str(tmp_path / "recipe.json"), **given)
        assert made.method == SNAPKV
        assert made.model.dtype == torch.float32
        assert made.device.type == "cpu"


def test_a_recipe_of_another_model_is_refused(tmp_path):
    path = tmp_path / "recipe.json"
    recipe(path)
    with pytest.raises(InputFileError, match="another dtype"):
        SparingLM(recipe=str(path), dtype="bfloat16")


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({}, InvalidInputError, "pretrained: got None"),
        ({"pretrained": "bundled", "keep": 0.5}, InvalidInputError, "keep: got 0.5"),
        ({"pretrained": "bundled", "method": "snapk"}, UnknownNameError, "did you mean snapkv"),
        ({"pretrained": "bundled", "method": "snapkv(window=8"}, InvalidInputError, "name"),
        ({"pretrained": "bundled", "method": "snapkv", "keep": 1.5}, InvalidInputError, "keep"),
        ({"pretrained": "bundled", "recipe": "nowhere.json"}, InputFileError, "nowhere.json"),
        ({"pretrained": "bundled", "dtype": "int3"}, InvalidInputError, "dtype"),
        ({"pretrained": "./nowhere"}, UnsupportedModelError, "no such folder"),
        ({"pretrained": "someone/model@"}, UnsupportedModelError, "names no revision"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(given, error, says, monkeypatch):
    monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(error, match=says):
        SparingLM(**given)


def test_a_recipe_and_a_method_are_one_too_many(tmp_path):
    recipe(tmp_path / "recipe.json")
    for extra in ({"method": "snapkv"}, {"keep": 0.5}):
        with pytest.raises(InvalidInputError, match="beside a recipe"):
            SparingLM(recipe=str(tmp_path / "recipe.json"), **extra)


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_knows_the_model_type_and_our_errors_are_one_line(monkeypatch, capsys):
    import lm_eval.__main__
    from lm_eval.api.registry import get_model

    def evaluate():
        assert get_model("sparing") is SparingLM
        get_model("sparing")(pretrained="bundled", method="snapk")

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", evaluate)
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("Error: unknown method")
    assert told.count("\n") == 1

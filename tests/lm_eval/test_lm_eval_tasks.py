"""Tasks of the harness in `sparing compare`: its documents, its prompts, its scores."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import datasets
import lm_eval
import numpy as np
import pytest
import torch

import sparing
from sparing.compare.engine import FULL, Engine
from sparing.errors import InvalidInputError, MissingExtraError
from sparing.lm_eval import harness
from sparing.lm_eval.tasks import HarnessTask, load
from sparing.loading import ModelSpec
from sparing.models import resolve

WRITTEN = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
LENGTH = 1024


@pytest.fixture(scope="module")
def loaded():
    return ModelSpec("bundled", "float32", "cpu").load()


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded.tokenizer


# -- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITTEN)
def test_a_prompt_is_the_harness_own_cut_at_its_question(tokenizer, name):
    task = load(name)
    for index in (0, 1, 20):
        sample = task.sample(tokenizer, LENGTH, 0, index)
        (question,) = sample.questions
        document = question.request.doc
        prompt = question.request.args[0]
        assert [*sample.context_ids, *question.token_ids] == tokenizer(prompt)["input_ids"]
        assert sample.length <= LENGTH + (50 if name == "ruler_fwe" else 0)
        assert question.text.startswith(("\nWhat is the special magic", "\nQuestion: "))
        assert question.text == tokenizer.decode(question.token_ids)
        assert prompt.endswith(document["gen_prefix"])
        assert question.answers == tuple(document["outputs"])
        context = tokenizer.decode(sample.context_ids)
        assert all(answer in context for answer in question.answers)
        assert "Question: " not in context.split("\n\n")[-1]
        assert (question.max_new_tokens, question.one_line) == (task_tokens(name), False)
        assert f"{task.label}/seed=0/index={index}" in sample.name


def task_tokens(name):
    return {"ruler_vt": 30, "ruler_cwe": 120, "ruler_fwe": 50}.get(name, 128)


@pytest.mark.parametrize("name", ["ruler_vt", "ruler_cwe"])
def test_samples_depend_on_the_seed_alone_and_leave_no_trace(tokenizer, name):
    """The generator of ruler_cwe keeps a state: without a fresh start its second list of words is another one."""
    task = load(name)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first, other = task.sample(tokenizer, LENGTH, 3, 2), task.sample(tokenizer, LENGTH, 4, 2)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.seed(6)
    harness.written.cache_clear()
    assert task.sample(tokenizer, LENGTH, 3, 2) == first
    assert other.context_ids != first.context_ids


@pytest.mark.slow
def test_samples_are_the_same_in_every_process(tokenizer, no_download):
    """Workers on other machines draw them again; there, the first import of a module may draw numbers too."""
    code = f"""
from sparing.lm_eval.tasks import load
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({tokenizer.name_or_path!r})
print(load("ruler_cwe").sample(tokenizer, {LENGTH}, 0, 11).context_ids)
"""
    environment = {**os.environ, "NLTK_DATA": str(no_download)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == load("ruler_cwe").sample(tokenizer, LENGTH, 0, 11).context_ids


def test_a_task_travels():
    """To workers on other machines."""
    task = load("lm_eval:niah_single_1")
    assert pickle.loads(pickle.dumps(task)) == task
    assert task.label == "lm_eval:niah_single_1"
    assert (task.num_samples, task.questions_per_context, task.metric) == (None, 1, "string_match_all")
    assert load("ruler_qa_squad").metric == "string_match_part"


# -- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_the_harness_own(tokenizer):
    task = load("ruler_vt")
    (question,) = task.sample(tokenizer, LENGTH, 0, 1).questions
    names = question.answers
    assert task.score(question, " " + " ".join(names)) == 1
    assert task.score(question, f"{names[0].lower()}\n\nfoo{names[3]}bar {names[4]}") == pytest.approx(3 / 5)
    assert task.score(question, "") == 0
    whole = question.task.process_results(question.request.doc, [f"{names[2]} and more"])
    assert task.score(question, f"{names[2]} and more") == whole[str(LENGTH)] == pytest.approx(1 / 5)


@pytest.mark.slow
def test_a_run_of_the_harness_and_the_query_aware_comparison_are_one(loaded):
    """The harness evaluates its documents with our model type; we read the same ones our way."""
    from sparing.lm_eval.model import SparingLM

    name, count, method = "ruler_vt", 3, sparing.SnapKV(keep=0.25, window=8)
    task = load(name)
    made = harness.written(name, loaded.tokenizer.name_or_path, LENGTH, 0)
    model = SparingLM(loaded.model, method=method, tokenizer=loaded.tokenizer, batch_size=2)
    results = lm_eval.simple_evaluate(model=model, tasks=[made], limit=count, bootstrap_iters=0)
    with sparing.use(loaded.model, FULL) as session:
        engine, scores, answers = Engine(loaded, session), [], []
        for index in range(count):
            sample = task.sample(loaded.tokenizer, LENGTH, 0, index)
            (question,) = sample.questions
            reading = engine.read([*sample.context_ids, *question.token_ids], [method])
            compressed = engine.compress(reading, method)
            output = engine.answer(compressed, (), question.max_new_tokens, reading.next_logits)
            answers.append(engine.text(output))
            scores.append(task.score(question, answers[-1]))
    assert [sample["resps"][0][0] for sample in results["samples"][name]] == answers
    assert [sample[str(LENGTH)] for sample in results["samples"][name]] == scores
    assert results["results"][name][f"{LENGTH},none"] == pytest.approx(sum(scores) / count)
    assert results["config"]["sparing"]["prompts"] == count


# -- other tasks ----------------------------------------------------------------------------------------------------

OTHER = """
task: colours
custom_dataset: !function code.documents
output_type: {kind}
test_split: test
fewshot_split: test
num_fewshot: 2
description: "Read.\\n"
doc_to_text: "{{{{text}}}}\\nQuestion: {{{{asked}}}}\\nAnswer:"
doc_to_target: "{{{{colour}}}}"
doc_to_choice: ["red", "blue"]
generation_kwargs: {{until: ["."], max_gen_toks: 9, do_sample: {sampled}}}
filter_list:
  - name: last_word
    filter: [{{function: regex, regex_pattern: "(\\\\w+)$"}}, {{function: take_first}}]
process_results: !function code.judge
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
"""
CODE = """
import datasets
COLOURS = ["red", "blue", "green"]
def documents(**_):
    rows = []
    for n in range(40):
        colour = COLOURS[n % 3]
        rows.append(dict(text=f"Line one.\\nThe cup {n} is {colour}.", asked=f"Cup {n}?", colour=colour))
    return {"test": datasets.Dataset.from_list(rows, split=datasets.Split.TEST)}
def judge(doc, results):
    return {"exact_match": float(results[0] == doc["colour"]), "acc": 55.0}
"""


@pytest.fixture
def other(tmp_path, monkeypatch):
    """A function that makes the harness know one task more, which needs no tokenizer and no length."""
    from lm_eval.tasks import TaskManager

    def make(kind="generate_until", metric="exact_match", sampled="false"):
        folder = tmp_path / f"{kind}{metric}{sampled}"
        folder.mkdir()
        (folder / "colours.yaml").write_text(OTHER.format(kind=kind, metric=metric, sampled=sampled))
        (folder / "code.py").write_text(CODE)
        manager = TaskManager(include_defaults=False, include_path=str(folder))
        monkeypatch.setattr(harness, "_everything", lambda: manager)
        harness.downloaded.cache_clear()

    yield make
    harness.downloaded.cache_clear()


def test_a_task_with_texts_of_its_own(other, tokenizer):
    other()
    task = load("lm_eval:colours:question_lines=2")
    assert (task.num_samples, task.metric) == (40, "exact_match")
    assert load(task.label) == task
    assert task.label == "lm_eval:colours:question_lines=2"
    sample = task.sample(tokenizer, None, 0, 30)
    (question,) = sample.questions
    assert question.text == "\nQuestion: Cup 30?\nAnswer:"
    assert (question.answers, question.max_new_tokens) == (("red",), 9)
    context = tokenizer.decode(sample.context_ids)
    assert context.count("Answer:") == 2  # the examples
    assert context.endswith("The cup 30 is red.")
    assert task.score(question, " it is red. And blue") == 1
    assert task.score(question, " it is blue. And red") == 0
    (again,) = load(task.label).sample(tokenizer, None, 0, 3).questions
    assert again.request.args[0] != question.request.args[0]


def test_examples_are_those_of_the_harness(other, tokenizer):
    """Drawn document by document: what the thirtieth prompt holds must not depend on what was asked before."""
    other()
    task = load("colours")
    late = task.sample(tokenizer, None, 0, 30).context_ids
    harness.downloaded.cache_clear()
    for index in (3, 17, 30):
        sample = task.sample(tokenizer, None, 0, index)
    assert sample.context_ids == late
    whole = harness.downloaded("colours", 0)
    whole.set_fewshot_seed(1234)
    whole.build_all_requests()
    assert tokenizer.encode(whole.instances[30].args[0])[: len(late)] == late


@pytest.mark.parametrize(
    ("options", "text", "says"),
    [
        ({"kind": "multiple_choice"}, "colours", "answers are generated, not multiple_choice"),
        ({"sampled": "true"}, "colours", "do_sample"),
        ({"metric": "acc"}, "colours", "a score from 0 to 1"),
        ({}, "colours:question_lines=90", "less than the lines"),
        ({}, "colors", "did you mean colours"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, tokenizer, options, text, says):
    other(**options)

    def compare():
        task = load(text)
        (question,) = task.sample(tokenizer, None, 0, 0).questions
        task.score(question, "red")

    with pytest.raises(InvalidInputError, match=says):
        compare()


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "length", "says"),
    [
        ("niah_single_1", 100, "Could not generate any sample"),
        ("ruler_vt", 500, "length of ruler_vt: got 500, allowed is at least"),
        ("ruler_cwe", 100, "length of ruler_cwe: got 100, allowed is at least"),
        ("ruler_cwe", 400, "words in it"),
        ("ruler_fwe", 150, "allowed is at least"),
        ("ruler_fwe", None, "a positive number of tokens"),
    ],
)
def test_a_length_that_is_too_short_is_refused_and_not_tried_for_ever(tokenizer, name, length, says):
    with pytest.raises(InvalidInputError, match=says):
        load(name).sample(tokenizer, length, 0, 0)


def test_data_that_is_not_here_is_named(tokenizer, monkeypatch):
    def no_network(path, *_, **__):
        raise ConnectionError(f"Couldn't reach {path} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(InvalidInputError, match="paul_graham_essays") as told:
        load("niah_single_2").sample(tokenizer, LENGTH, 0, 0)
    assert "these that need no download: niah_single_1" in str(told.value)


def test_there_are_500_samples(tokenizer):
    with pytest.raises(InvalidInputError, match="index: got 500, allowed is 0 to 499"):
        load("niah_single_1").sample(tokenizer, LENGTH, 0, 500)


def test_a_tokenizer_without_a_name_cannot_be_loaded_again():
    class Letters:
        def encode(self, text, add_special_tokens=True):
            return list(text.encode())

    with pytest.raises(InvalidInputError, match="loaded from a folder"):
        load("niah_single_1").sample(Letters(), LENGTH, 0, 0)


def test_texts_of_their_own_have_no_length(other, tokenizer):
    other()
    with pytest.raises(InvalidInputError, match="have their own lengths"):
        load("colours").sample(tokenizer, 128, 0, 0)


@pytest.mark.parametrize("option", ["lines=2", "question_lines=0", "question_lines=two"])
def test_unknown_options_are_refused(option):
    with pytest.raises(InvalidInputError, match="question_lines=N"):
        load(f"niah_single_1:{option}")


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"sparing\[lm-eval\]"):
        load("niah_single_1")


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path, no_download, loaded):
    """`lm_eval` with our model type, on generated documents, without a network; its answers are those of sparing."""
    folder = resolve("bundled")
    arguments = ["--model", "sparing", "--tasks", "ruler_vt", "--limit", "2", "--batch_size", "2", "--device", "cpu"]
    arguments += ["--model_args", f"pretrained={folder},dtype=float32,method=snapkv(window=8,kernel_size=5),keep=0.5"]
    arguments += ["--metadata", '{"max_seq_lengths": [1024]}', "--log_samples", "--output_path", str(tmp_path)]
    environment = {**os.environ, "NLTK_DATA": str(no_download)}
    done = subprocess.run(
        [sys.executable, "-m", "sparing.lm_eval", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text())
    held = results["config"]["sparing"]
    assert held["method"].startswith("SnapKV(keep=0.5")
    assert held["prompts"] == 2
    assert 0.5 < held["share"] < 0.7
    assert f"{held['bytes_kept']:,} of {held['bytes_full']:,} bytes" in done.stderr
    samples = [json.loads(line) for line in next(tmp_path.rglob("samples_*.jsonl")).read_text().splitlines()]
    for logged in samples:
        ids = torch.tensor([loaded.tokenizer.encode(logged["arguments"]["gen_args_0"]["arg_0"])])
        with sparing.use(loaded.model, sparing.SnapKV(keep=0.5, window=8, kernel_size=5)):
            tokens = loaded.model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :]
        assert logged["resps"] == [[loaded.tokenizer.decode(tokens, skip_special_tokens=True)]]
    mean = sum(logged["1024"] for logged in samples) / 2
    assert results["results"]["ruler_vt"]["1024,none"] == pytest.approx(mean)


def test_a_task_of_the_harness_is_a_task():
    assert isinstance(load("niah_single_1"), HarnessTask)
    assert Path(harness.inspect.getfile(lm_eval)).name == "__init__.py"
    assert "site-packages" in lm_eval.__file__  # and not this package's folder, which has the same name

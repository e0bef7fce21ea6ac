"""The committed model answers, and the recipe that made it runs and resumes."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sparing.models import BUNDLED, resolve
from sparing.models.recipe import questions
from sparing.models.recipe.encoding import Encoder
from sparing.models.recipe.evaluate import accuracy, held_out_loss, unigram_loss
from sparing.models.recipe.export import export
from sparing.models.recipe.network import Network, Shape, rotations
from sparing.models.recipe.samples import Source
from sparing.models.recipe.tokenization import train_tokenizer
from sparing.models.recipe.train import INDUCTION, MIXED, Stage, Trainer
from sparing.tasks import formats

TINY = Shape(width=16, layers=2, heads=2, kv_heads=1, head_width=8, hidden=32)


@cache
def bundled() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(resolve("bundled")).eval()


@cache
def emma() -> Source:
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    text = (files("sparing.tasks") / "data" / "emma.txt").read_text()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return Source(Encoder(tokenizer), np.array(ids, np.uint16))


def test_resolve_leaves_other_names_alone() -> None:
    assert resolve("bundled") == str(BUNDLED)
    assert resolve("some/model") == "some/model"


def test_bundled_model_is_a_small_llama() -> None:
    assert isinstance(bundled(), LlamaForCausalLM)
    assert bundled().config.num_key_value_heads < bundled().config.num_attention_heads
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= 12e6


def test_tokenizer_puts_bos_first_and_joins_pieces() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    assert tokenizer("The grass").input_ids[0] == tokenizer.bos_token_id
    needle = formats.NEEDLE.format(kind="number", key="amber river", value="71234")
    whole = tokenizer(needle, add_special_tokens=False).input_ids
    assert emma().encoder.fill(formats.NEEDLE, kind="number", key="amber river", value="71234") == whole
    assert tokenizer.decode(whole) == needle


@pytest.mark.parametrize("length", [512, 1024])
def test_bundled_model_finds_needles(length: int) -> None:
    row = accuracy(bundled(), emma(), lambda s, r, n: questions.needles(s, r, n, 1, 1), length, 30)
    assert row["accuracy"] >= 0.9


def test_bundled_model_generates_the_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    context = tokenizer(formats.NOISE + formats.NEEDLE.format(kind="number", key="amber river", value="71234"))
    question = formats.NEEDLE_QUESTION.format(kind="number", key="amber river")
    ids = context.input_ids + tokenizer(question, add_special_tokens=False).input_ids
    made = bundled().generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(made[0, len(ids) :]) == " 71234."


def test_bundled_model_predicts_text_far_better_than_frequencies() -> None:
    loss = held_out_loss(bundled(), emma(), count=10)
    assert loss < unigram_loss(emma().corpus, emma().corpus, emma().encoder.vocabulary) - 1.5


def small_source() -> Source:
    text = " The old man went to sea.\n\nHe came home again with a fish for his wife, who said: no." * 100
    tokenizer = train_tokenizer([text])
    return Source(Encoder(tokenizer), np.array(tokenizer.encode(text).ids, np.uint16))


def test_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    source = small_source()
    first = Stage(64, 512, INDUCTION, batch_tokens=256)
    stages = (first, Stage(128, 512, MIXED, 1.0, 0.5, batch_tokens=256))
    straight = Trainer(source, TINY, seed=1)
    straight.run(stages, tmp_path / "straight")
    stopped = Trainer(source, TINY, seed=1)
    stopped.run((first,), tmp_path / "resumed")
    resumed = Trainer(source, TINY, seed=2)
    resumed.load(tmp_path / "resumed" / "checkpoint.pt")
    resumed.run(stages, tmp_path / "resumed")
    for name, weights in straight.network.state_dict().items():
        assert torch.equal(weights, resumed.network.state_dict()[name]), name
    assert straight.total == resumed.total == 1024


def test_exported_model_computes_what_the_network_does(tmp_path: Path) -> None:
    source = small_source()
    network = Network(TINY)
    export(network, source.encoder.tokenizer, tmp_path)
    ids = torch.randint(3, 500, (1, 40))
    hidden = network.model(ids, *rotations(torch.arange(40), TINY))
    expected = torch.nn.functional.linear(hidden, network.model.embed_tokens.weight)
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected, atol=1e-4)

"""The registry, and methods written as text."""

import dataclasses
import re

import pytest

from sparing.core.actions import Action
from sparing.core.allocate import ALLOCATORS, AdaptiveHeads, Pyramid, Uniform
from sparing.core.method import Evict, Method, Parts, methods, register
from sparing.core.parsing import parse_method, split_methods
from sparing.core.scorer import Scorer
from sparing.errors import InvalidInputError, MethodRefusedError, UnknownNameError
from sparing.methods.kv.h2o import H2O
from sparing.methods.kv.keydiff import KeyDifference
from sparing.methods.kv.snapkv import SnapKV
from sparing.methods.kv.tova import TOVA

NAMES = [
    "adakv", "expected_attention", "h2o", "keydiff", "knorm", "leverage",
    "pyramidkv", "random", "snapkv", "streaming_llm", "tova",
    "chunkkv", "compactor", "criticalkv", "ems",
]  # fmt: skip


def test_the_registry_knows_them_all_by_unique_names():
    assert set(NAMES) <= set(methods())
    assert list(methods()) == sorted(methods())
    recipes = [info.recipe for info in methods().values()]
    assert len(set(recipes)) == len(recipes)
    with pytest.raises(AssertionError, match="two methods named snapkv"):
        register("snapkv", paper="-", summary="a second one")(SnapKV)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_says_what_it_is(name):
    info = methods()[name]
    assert info.name == name == info.recipe().label
    assert re.fullmatch(r"\d{4}\.\d{5}", info.paper) or (name == "random" and info.paper == "-")
    assert len(info.summary) > 20
    assert "\n" not in info.summary
    assert info.paper == "-" or f"arXiv:{info.paper}" in __import__(info.recipe.__module__, fromlist=["x"]).__doc__
    assert info.moment == info.recipe().parts().moment


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_a_frozen_value(name):
    recipe = methods()[name].recipe
    assert recipe() == recipe()
    assert hash(recipe().parts().scorer) == hash(recipe().parts().scorer)  # scorers are keys of a dict
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe().keep = 0.1


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("snapkv", SnapKV(0.3)),
        (" snapkv() ", SnapKV(0.3)),
        ("snapkv(window=16, kernel_size=7)", SnapKV(0.3, 16, 7)),
        ("h2o(recent=1)", H2O(0.3, 1.0)),
        ("h2o(moment=prefill_end)", H2O(0.3, 0.5, "prefill_end")),
        ("h2o(moment='prefill_end')", H2O(0.3, 0.5, "prefill_end")),
        ("snapkv(keep=0.1)", SnapKV(0.1)),
        ("snapkv(keep=64MiB)", SnapKV("64MiB")),
        ("keydiff+adaptive(floor=0.1)", Evict(0.3, KeyDifference(), AdaptiveHeads(0.1))),
        ("keydiff(recent=2,keep=9) + pyramid(beta=2,window=3)", Evict(9, KeyDifference(2), Pyramid(2.0, 3))),
        ("keydiff+uniform", Evict(0.3, KeyDifference(), Uniform())),
    ],
)
def test_text(text, method):
    assert parse_method(text, keep=0.3) == method


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_every_scorer_goes_with_every_allocator(name, allocator):
    method = parse_method(f"{name}+{allocator}")
    assert method.label.endswith(type(method.parts().allocator).__name__)


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("snapvk", "did you mean snapkv"),
        ("snapkv+adaptve", "did you mean adaptive"),
        ("snapkv(windw=3)", "did you mean window"),
        ("zzz", "one of .*adakv, "),
        ("snapkv+proportional", "unknown allocator"),
    ],
)
def test_unknown_names_suggest(text, suggestion):
    with pytest.raises(UnknownNameError, match=suggestion):
        parse_method(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "method: got ''"),
        ("snapkv(window=16", "method: got"),
        ("snapkv+", "method: got ''"),
        ("snapkv+uniform+uniform", "method: got"),
        ("snapkv(16)", "fields written as name=value"),
        ("snapkv(window=1,window=2)", "each field once"),
        ("snapkv(window=wide)", "snapkv.window: got 'wide', allowed is a value of type int"),
        ("snapkv(window=1.5)", "snapkv.window: got 1.5"),
        ("snapkv(window=true)", "snapkv.window: got True"),
        ("snapkv(kernel_size=4)", "kernel_size: got 4, allowed is an odd number"),
        ("snapkv(keep=2.5)", "keep: got 2.5"),
        ("adakv(scorer=knorm)", "adakv.scorer: got 'knorm'.*in Python"),
        ("snapkv+adaptive(layers=pyramid)", "adaptive.layers: got 'pyramid'.*in Python"),
        ("h2o(moment=never)", "moment: got 'never'"),
        ("h2o(recent=nan)", "recent: got nan"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(InvalidInputError, match=message):
        parse_method(text)


def test_lists_are_split_outside_brackets():
    text = "snapkv(window=8,kernel_size=3), h2o ,keydiff+adaptive(floor=0.1,layers=x),,tova"
    expected = ["snapkv(window=8,kernel_size=3)", "h2o", "keydiff+adaptive(floor=0.1,layers=x)", "tova"]
    assert split_methods(text) == expected
    assert split_methods(" ") == []


def test_combinations_that_are_not_defined_are_refused():
    with pytest.raises(MethodRefusedError, match=r"Scorer cannot follow decoding; use moment=.prefill_end"):
        Evict(0.5, Scorer(), moment="every_step")
    with pytest.raises(MethodRefusedError, match=r"Scorer cannot score a prompt that is dropped in parts"):
        Evict(0.5, Scorer(), moment="chunk_end")
    with pytest.raises(MethodRefusedError, match="equal budgets of all heads"):
        Evict(0.5, H2O().parts().scorer, AdaptiveHeads(), "every_step")
    with pytest.raises(MethodRefusedError, match="single ones are replaced"):
        Evict(0.5, TOVA().parts().scorer, moment="every_step", action=Action())
    for period in (0, 1.0, -0.5, True, "often"):
        with pytest.raises(InvalidInputError, match="period"):
            Evict(0.5, SnapKV().parts().scorer, moment="every_step", period=period)
    with pytest.raises(InvalidInputError, match="min_prompt"):
        SnapKV(min_prompt=-1)
    with pytest.raises(InvalidInputError, match="moment: got 'sometimes'"):
        Parts(Scorer(), Uniform(), "sometimes").check("x")
    with pytest.raises(InvalidInputError, match=r"Evict.scorer: got None"):
        Evict(0.5)
    with pytest.raises(InvalidInputError, match="keep: got 0"):
        SnapKV(keep=0)
    with pytest.raises(NotImplementedError):
        Method()

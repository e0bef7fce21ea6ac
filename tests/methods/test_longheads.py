"""LongHeads: chunks by their representation, read at compact positions."""

import math

import pytest
import torch
from oracles import EPS, PlainRotary, build, random_case

from methods.reading import best_of_blocks, decode, prompt_state, queries_of, stored_until
from sparing.errors import InvalidInputError
from sparing.methods.kv.longheads import ChunkSelection, LongHeads

PADS, DIM = (0, 3, 7), 8
ROTARY = PlainRotary(DIM)
# A rotation rounds each number once or twice; sums of 8 numbers of size < 10, twice over.
TOLERANCE = 2**10 * EPS


def attend(query, keys, values, scale):
    weights = [math.exp(scale * float(query @ key)) for key in keys]
    return sum(w / sum(weights) * value for w, value in zip(weights, values, strict=True))


def represented(case, row, query_head, start, size):
    """c of one chunk, in float64, from queries and keys turned back to no rotation."""
    kv, scale = query_head // 2, case.queries.softmax.scaling
    slots, pad = range(start, start + size), PADS[row]
    back = [ROTARY.matrix(slot - pad).T for slot in slots]
    inside = [ROTARY.matrix(i) for i in range(size)]
    queries = [t @ case.queries.states[row, query_head, slot].double() for t, slot in zip(back, slots, strict=True)]
    keys = [t @ case.stored.keys[row, kv, slot].double() for t, slot in zip(back, slots, strict=True)]
    values = [case.stored.values[row, kv, slot].double() for slot in slots]
    local = [turn @ key for turn, key in zip(inside, keys, strict=True)]
    rows = [attend(turn @ query, local, values, scale) for turn, query in zip(inside, queries, strict=True)]
    return attend(sum(rows) / size, local, local, scale)


@pytest.mark.parametrize("sizes", [(17,), (1,) * 17, (5, 9, 3)], ids=str)
def test_chunks_are_represented_as_the_equation_says(sizes):
    case = random_case(seed=1, tokens=17, rotary=ROTARY)
    chunks = prompt_state(ChunkSelection(4), case, 17, sizes)["chunks"]
    compared = 0
    for row, pad in enumerate(PADS):
        for head in range(4):
            for number in range((17 - pad) // 4):
                wanted = represented(case, row, head, pad + 4 * number, 4)
                torch.testing.assert_close(chunks[row, head, number].double(), wanted, atol=TOLERANCE, rtol=0)
                compared += 1
    assert compared == 4 * (4 + 3 + 2)


def test_reads_the_ends_and_the_best_chunks():
    case = random_case(seed=2, tokens=30, rotary=ROTARY)
    cut = 0
    for read in decode(ChunkSelection(4), case, prompt=24, count=14):
        tokens = read.step.stored.keys.shape[2]
        for row, pad in enumerate(PADS):
            full = (tokens - pad) // 4
            query = [ROTARY.matrix(tokens - 1 - pad).T @ q for q in case.queries.states[row, :, tokens - 1].double()]
            for head in range(2):
                scores = [
                    sum(float(query[h] @ represented(case, row, h, pad + 4 * c, 4)) for h in (2 * head, 2 * head + 1))
                    for c in range(full)
                ] + [0.0] * ((tokens - pad) % 4 > 0)
                scores[full - 1], scores[0], scores[-1] = 1e9, 2e9, 3e9
                assert read.slots(row, head) == best_of_blocks(scores, 4, tokens, pad, 14)
                cut += 1
    assert cut == 6 * 6


def test_the_new_token_comes_first_when_room_is_scarce():
    reads = decode(ChunkSelection(4), random_case(tokens=14, rotary=ROTARY), prompt=13, count=3)
    assert reads[0].slots(0, 0) == [3, 12, 13]  # the unfinished chunk, then the end of the first
    reads = decode(ChunkSelection(8), random_case(tokens=14, rotary=ROTARY), prompt=13, count=3)
    assert reads[0].slots(0, 0) == [11, 12, 13]


def test_enough_room_is_dense():
    reads = decode(ChunkSelection(4), random_case(tokens=15, rotary=ROTARY), prompt=13, count=15)
    assert all(read.choice.slots is None for read in reads)


def planted(where: int, tokens: int = 33):
    """A chunk of 4 whose keys answer the query in a channel that turns slowly, at number `where`; others are zero."""
    plain = torch.zeros(tokens, DIM)
    plain[4 * where : 4 * where + 4, 3] = torch.tensor([3.0, 4.0, 5.0, 6.0])
    query = torch.zeros(tokens, DIM)
    query[:, 3] = 1.0
    positions = torch.arange(tokens)[None]
    keys, queries = (ROTARY.rotate(t[None, None], positions) for t in (plain, query))
    return build(queries, keys, rotary=ROTARY)


def test_planted_chunk_is_read():
    for where in (1, 3, 5):
        read = decode(ChunkSelection(4), planted(where), prompt=32, count=13)[0]
        assert read.slots(0, 0) == [0, 1, 2, 3, *range(4 * where, 4 * where + 4), *range(28, 33)]


def test_attention_depends_on_the_new_distances_only():
    """Wherever the chunk was found, its keys and the query come out the same: at 4 to 7 and at 12 of 13 tokens."""
    reads = [decode(ChunkSelection(4), planted(where), prompt=32, count=13)[0] for where in (1, 3, 6)]
    for read in reads:
        real = read.choice.valid[0, 0]
        torch.testing.assert_close(read.choice.keys[0, 0, real], reads[0].choice.keys[0, 0, :13], atol=1e-5, rtol=0)
        torch.testing.assert_close(read.choice.query, reads[0].choice.query, atol=1e-5, rtol=0)
    chunk, query = reads[0].choice.keys[0, 0, 4:8].double(), reads[0].choice.query[0, 0].double()
    for place, key in enumerate(chunk):
        wanted = (3.0 + place) * float((ROTARY.matrix(12) @ ROTARY.matrix(4 + place).T)[3, 3])  # cos of the distance
        assert float(query @ key) == pytest.approx(wanted, abs=1e-4)


def test_a_crop_leaves_what_a_shorter_prompt_would():
    case, reader = random_case(seed=3, tokens=22, rotary=ROTARY), ChunkSelection(4)
    state = prompt_state(reader, case, 20)
    cropped = reader.crop(state, 17)
    for tokens in (18, 19, 20):
        part = prompt_state(reader, case, tokens)
        cropped = reader.observe(cropped, queries_of(case, tokens - 1, tokens), stored_until(case, tokens))
        for row, pad in enumerate(PADS):
            full = (tokens - pad) // 4
            mine, wanted = cropped["chunks"][row, :, :full], part["chunks"][row, :, :full]
            torch.testing.assert_close(mine, wanted, atol=TOLERANCE, rtol=0)


def test_without_rotation_nothing_moves():
    read = decode(ChunkSelection(4), random_case(tokens=20), prompt=19, count=9)[0]
    assert read.choice.keys is None
    assert read.choice.query is None


def test_the_papers_chunk_and_what_is_refused():
    assert LongHeads().chunk == 256
    assert LongHeads().parts().reader.needs_rotary
    with pytest.raises(InvalidInputError, match="chunk"):
        LongHeads(chunk=0)

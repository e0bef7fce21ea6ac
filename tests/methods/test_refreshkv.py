"""RefreshKV: when everything is read, and what is read in between."""

import pytest
import torch
from oracles import build, dense_attention, random_case

from methods.reading import decode
from sparing.core.scorer import Softmax
from sparing.errors import InvalidInputError
from sparing.methods.kv.refreshkv import RecycledAttention, RefreshKV
from sparing.methods.kv.snapkv import WindowAttention

PADS = (0, 3, 7)


def best(case, row, head, last, kernel, count):
    """Slots by the attention of token `last`: max over neighbours, max over the group; ties to the earlier."""
    attention, pad = dense_attention(case.queries, case.stored), PADS[row]
    there = range(pad, last + 1)
    near = {j: [m for m in range(j - kernel // 2, j + kernel // 2 + 1) if m in there] for j in there}
    score = {j: max(attention[row][2 * head + g][last][m] for g in (0, 1) for m in near[j]) for j in there}
    return sorted(there, key=lambda j: (-score[j], j))[:count]


@pytest.mark.parametrize("kernel", [1, 3])
def test_between_full_tokens_the_last_row_says_what_is_read(kernel):
    case = random_case(seed=1, tokens=19)
    reads = decode(RecycledAttention(stride=3, kernel_size=kernel), case, prompt=12, count=5)
    asked, partial = 11, 0
    for token, read in enumerate(reads, start=12):
        for row, pad in enumerate(PADS):
            for head in range(2):
                if (token - 11) % 3 == 0:
                    assert read.slots(row, head) == list(range(pad, token + 1))
                    continue
                newer = list(range(asked + 1, token + 1))
                wanted = best(case, row, head, asked, kernel, 5 - len(newer)) + newer
                assert read.slots(row, head) == sorted(wanted)
                partial += 1
        asked = token if (token - 11) % 3 == 0 else asked
    assert partial == 5 * 6


def test_stride_one_and_enough_room_are_dense():
    case = random_case(seed=2, tokens=17)
    for reader, count in ((RecycledAttention(stride=1), 2), (RecycledAttention(stride=50), 17)):
        for read in decode(reader, case, prompt=12, count=count):
            for row, pad in enumerate(PADS):
                assert read.slots(row, 0) == list(range(pad, read.step.stored.keys.shape[2]))


def test_new_tokens_never_exceed_the_size():
    """Six tokens since the last full one and room for four: the four newest."""
    case = random_case(seed=3, tokens=18)
    assert decode(RecycledAttention(stride=50), case, prompt=12, count=4)[-1].slots(0, 0) == [14, 15, 16, 17]


def test_never_refreshed_it_reads_what_snapkv_keeps_with_a_window_of_one():
    g = torch.Generator().manual_seed(4)
    queries, keys = torch.randn(1, 2, 14, 8, generator=g), torch.randn(1, 2, 14, 8, generator=g)
    keys[:, :, 12] = 3 * queries[:, :, 12]  # the prompt's last token, which SnapKV keeps whatever its mass
    case = build(queries, keys)
    prompt = build(queries[:, :, :13], keys[:, :, :13])
    scores = prompt.score(WindowAttention(window=1, kernel_size=1))
    read = decode(RecycledAttention(stride=50, kernel_size=1), case, prompt=13, count=6)[0]
    for head in range(2):
        kept = scores[0, head, :12].topk(4).indices.tolist()
        assert read.slots(0, head) == sorted([*kept, 12, 13])


def planted():
    """Keys 2 and 7 stand out in one channel each. The prompt asks for 2; from token 12 on, 7 is asked for."""
    keys = torch.zeros(1, 1, 20, 2)
    keys[0, 0, 2, 0] = keys[0, 0, 7, 1] = 8.0
    queries = torch.tensor([1.0, 0.0]).repeat(20, 1)
    queries[12:] = torch.tensor([0.0, 1.0])
    return build(queries[None, None], keys, softmax=Softmax(1.0))


def test_a_switch_of_topic_is_found_at_the_next_full_token():
    reads = decode(RecycledAttention(stride=4, kernel_size=1), planted(), prompt=12, count=5)
    has = {12 + i: (2 in read.slots(0, 0), 7 in read.slots(0, 0)) for i, read in enumerate(reads)}
    assert [has[t] for t in (12, 13, 14)] == [(True, False)] * 3
    assert [has[t] for t in (15, 19)] == [(True, True)] * 2  # full tokens
    assert all(has[t][1] for t in (16, 17, 18))


def test_a_similar_query_needs_no_full_token():
    """The cosine is 1 until token 12 and 0 then: with s = 0.5 the check at token 11 passes by, that at 15 does not."""
    reads = decode(RecycledAttention(stride=4, similarity=0.5, kernel_size=1), planted(), prompt=8, count=4)
    full = [8 + i for i, read in enumerate(reads) if read.choice.slots is None]
    assert full == [15]
    assert not any(
        read.choice.slots is None
        for read in decode(RecycledAttention(stride=4, similarity=-0.5), planted(), prompt=8, count=4)
    )


def test_rows_keep_their_own_schedule():
    """Row 1 never changes its mind, so at token 15 only row 0 reads everything; alone, both do the same."""
    one = planted()
    states = torch.cat([one.queries.states, one.queries.states[:, :, :1].expand(-1, -1, 20, -1)])
    keys = one.stored.keys.expand(2, -1, -1, -1)
    both = decode(RecycledAttention(4, 0.5, 1), build(states, keys, softmax=Softmax(1.0)), prompt=8, count=4)
    assert both[7].slots(0, 0) == list(range(16))
    assert len(both[7].slots(1, 0)) == 4
    for row in range(2):
        alone = build(states[row : row + 1], keys[row : row + 1], softmax=Softmax(1.0))
        for mine, single in zip(both, decode(RecycledAttention(4, 0.5, 1), alone, prompt=8, count=4), strict=True):
            assert mine.slots(row, 0) == single.slots(0, 0)


def test_a_crop_forgets_a_full_row_that_was_taken_back():
    reader, case = RecycledAttention(stride=3), random_case(tokens=17)
    state = decode(reader, case, prompt=12, count=4)[-1].state  # full at 14 tokens seen + 1 = 15
    assert state["at"].tolist() == [15, 15, 15]
    assert reader.crop(state, 15) is state
    assert reader.crop(state, 14) is None


def test_the_defaults_and_what_is_refused():
    assert (RefreshKV().stride, RefreshKV().similarity, RefreshKV().kernel_size) == (5, 1.0, 7)
    for bad in ({"stride": 0}, {"similarity": 1.5}, {"similarity": float("nan")}, {"kernel_size": 2}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            RefreshKV(**bad)

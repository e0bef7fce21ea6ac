"""Where the cache is kept: a layer × head map per method, and the surviving tokens of one example.

The first map and the first colouring are written as HTML; the page's script redraws both from compact
data when another method, budget, layer or head is chosen.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from sparing.compare.report.summary import Section, ShareMap

Json = dict[str, Any]

DARK = 65  # percent of colour above which text turns light; the script has the same number
TOKENS_SHOWN = 6000
DATA_LIMIT = 1_200_000


def share_maps(section: Section) -> Json:
    """The maps of a section as whole percents, under "method|number of the keep"; and the top of the scale."""
    keeps = [budget.label for budget in section.budgets]
    maps: dict[str, list[list[int] | None]] = {}
    for number, budget in enumerate(section.budgets):
        for entry in budget.entries:
            if entry.share_map is not None:
                maps[f"{entry.method}|{number}"] = _percents(entry.share_map)
    with_map = {name.rpartition("|")[0] for name in maps}
    tops = [
        _top(values for name, values in maps.items() if name.endswith(f"|{number}")) for number in range(len(keeps))
    ]
    return {
        "methods": [n for n in section.methods if n in with_map],
        "keeps": keeps,
        "maps": maps,
        "tops": tops,
    }


def _top(maps: Iterable[list[list[int] | None]]) -> int:
    """The percent drawn in full colour, the same for all methods of a budget: in steps of 10."""
    most = max((value for layers in maps for layer in layers if layer for value in layer), default=100)
    return max(10, -(-most // 10) * 10)


def _percents(share_map: ShareMap) -> list[list[int] | None]:
    return [None if layer is None else [round(100 * share) for share in layer] for layer in share_map]


def share_map_html(section: Section, data: Json, number: int) -> str:
    """Selects for method and keep, and the map of the first of them."""
    if not data["maps"]:
        return '<p class="quiet">The rows hold no shares per head.</p>'
    first = next(iter(data["maps"]))
    method, _, keep = first.rpartition("|")
    methods = _options(data["methods"], method)
    keeps = "".join(
        f'<option value="{index}"{" selected" if str(index) == keep else ""}>{escape(label)}</option>'
        for index, label in enumerate(data["keeps"])
    )
    return (
        f'<div class="picks"><label>Method <select data-pick="method">{methods}</select></label>'
        f'<label>Keep <select data-pick="keep">{keeps}</select></label></div>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="share of tokens kept, layer by head">'
        f'<table class="map">{_map_table(data["maps"][first], data["tops"][int(keep)])}</table></div>'
        '<p class="ramp"><span>0 %</span><i aria-hidden="true"></i>'
        f'<span><span data-top="{number}">{data["tops"][int(keep)]}</span> % of the tokens kept</span></p>'
        f'<p class="caption" data-mapnote="{number}" aria-live="polite"></p>'
    )


def _map_table(layers: Sequence[Sequence[int] | None], top: int) -> str:
    """Layers down, heads across, and each layer's mean in the last column."""
    widest = max((len(layer) for layer in layers if layer), default=1)
    heads = "".join(f'<th scope="col">{head}</th>' for head in range(widest))
    rows = []
    for number, layer in enumerate(layers):
        name = f'<th scope="row">layer {number}</th>'
        if layer is None:
            rows.append(f'<tr>{name}<td class="none" colspan="{widest + 1}">not compressed</td></tr>')
            continue
        cells = "".join(_map_cell(value, top) for value in layer)
        cells += "<td></td>" * (widest - len(layer))
        rows.append(f'<tr>{name}{cells}<td class="mean">{sum(layer) / max(len(layer), 1):.0f}</td></tr>')
    head = f'<thead><tr><td>KV head</td>{heads}<th scope="col" class="mean">mean</th></tr></thead>'
    return f"{head}<tbody>{''.join(rows)}</tbody>"


def _map_cell(value: int, top: int) -> str:
    depth = min(100, round(100 * value / top))
    return f'<td class="{"hi" if depth > DARK else ""}" style="--v:{depth}%">{value}</td>'


def example_data(example: Json) -> Json:
    """The example for the script: which tokens are drawn, and per method a bit per token, head and layer."""
    tokens = [str(token) for token in example["tokens"]]
    marked = answer_tokens(tokens, str(example.get("answer", "")))
    shown = shown_tokens(len(tokens), marked)
    methods: list[Json] = []
    size = 0
    left_out = []
    for name, record in example.get("methods", {}).items():
        layers = [_bits_of(layer, shown) for layer in record.get("kept") or []]
        size += sum(len(bits) for layer in layers if layer for bits in layer)
        if methods and size > DATA_LIMIT:
            left_out.append(str(name))
            continue
        methods.append(
            {
                "name": str(name),
                "keep": str(record.get("keep", "")),
                "output": str(record.get("output", "")),
                "layers": layers,
            }
        )
    return {
        "shown": len(shown),
        "methods": methods,
        "leftOut": left_out,
        "answer": [shown.index(at) for at in marked],
    }


def _bits_of(layer: Sequence[Sequence[int]] | None, shown: Sequence[int]) -> list[str] | None:
    """A layer's heads as base64 of one bit per shown token; None for a layer that keeps everything."""
    if layer is None:
        return None
    packed = []
    for head in layer:
        kept = set(head)
        bits = bytearray((len(shown) + 7) // 8)
        for place, position in enumerate(shown):
            if position in kept:
                bits[place >> 3] |= 1 << (place & 7)
        packed.append(base64.b64encode(bytes(bits)).decode("ascii"))
    return packed


def answer_tokens(tokens: Sequence[str], answer: str) -> list[int]:
    """The positions of the tokens that spell the answer, or its parts when it is a list, in the context."""
    clean = [token.replace("Ġ", " ").replace("▁", " ") for token in tokens]
    text = "".join(clean)
    wanted = answer.strip().strip(".,;:\"'").strip()
    spans = _find(text, wanted)
    if not spans:
        spans = [
            span for part in wanted.split(",") if len(part.strip()) > 1 for span in _find(text, part.strip(" .\"'"))
        ]
    marked = []
    at = 0
    for position, token in enumerate(clean):
        end = at + len(token)
        if any(start < end and at < stop for start, stop in spans):
            marked.append(position)
        at = end
    return marked


def _find(text: str, part: str) -> list[tuple[int, int]]:
    """Where `part` stands in `text`, not overlapping."""
    found = []
    start = text.find(part) if part else -1
    while start >= 0:
        found.append((start, start + len(part)))
        start = text.find(part, start + len(part))
    return found


def shown_tokens(count: int, marked: Sequence[int]) -> list[int]:
    """All positions of a short context; of a long one its beginning, its end and around the answer."""
    if count <= TOKENS_SHOWN:
        return list(range(count))
    part = TOKENS_SHOWN // 3
    chosen = set(range(part)) | set(range(count - part, count))
    room = part // max(len(marked), 1)
    for position in marked[:part]:
        chosen |= set(range(max(0, position - room // 2), min(count, position + room // 2 + 1)))
    return sorted(chosen)


def example_html(example: Json, data: Json) -> str:
    """The example with its selects; the first method's colouring is drawn."""
    tokens = [str(token) for token in example["tokens"]]
    marked = set(answer_tokens(tokens, str(example.get("answer", ""))))
    shown = shown_tokens(len(tokens), sorted(marked))
    methods = _options([method["name"] for method in data["methods"]], data["methods"][0]["name"])
    layers = data["methods"][0]["layers"]
    layer_options = "".join(f'<option value="{number}">layer {number}</option>' for number in range(len(layers)))
    heads = max((len(layer) for layer in layers if layer), default=0)
    head_options = "".join(f'<option value="{number}">head {number}</option>' for number in range(heads))
    facts = [f"task {example.get('task')}", str(example.get("mode", "")), f"{len(tokens)} tokens"]
    note = f" Too large to show here: {', '.join(data['leftOut'])}." if data["leftOut"] else ""
    return (
        f'<p class="quiet">{escape(", ".join(fact for fact in facts if fact))}.{escape(note)}</p>'
        f'<dl class="qa"><dt>Question</dt><dd>{escape(str(example.get("question", "")).strip())}</dd>'
        f"<dt>Right answer</dt><dd><b>{escape(str(example.get('answer', '')).strip())}</b></dd>"
        '<dt>This method answered</dt><dd id="ex-output"></dd></dl>'
        f'<div class="picks"><label>Method <select id="ex-method">{methods}</select></label>'
        f'<label>Layer <select id="ex-layer">'
        f'<option value="">all layers</option>{layer_options}</select></label>'
        f'<label>Head <select id="ex-head">'
        f'<option value="">all heads</option>{head_options}</select></label></div>'
        '<p class="ramp"><span class="dropped">dropped everywhere</span><i aria-hidden="true"></i>'
        '<span>kept by every chosen head</span><span class="answermark">answer</span></p>'
        '<p class="caption" id="ex-note" aria-live="polite"></p>'
        f'<div class="tokens" id="ex-tokens" tabindex="0" role="region" '
        'aria-label="the context, token by token">'
        f"{_token_spans(tokens, shown, marked)}</div>"
    )


def _token_spans(tokens: Sequence[str], shown: Sequence[int], marked: set[int]) -> str:
    """One element a token; jumps in a shortened context are said."""
    parts = []
    last = -1
    for position in shown:
        if position > last + 1:
            parts.append(f"<em>… {position - last - 1} tokens …</em>")
        text = tokens[position].replace("Ġ", " ").replace("▁", " ").replace("\r", "").replace("\n", "⏎\n")
        parts.append(f"<b>{escape(text)}</b>" if position in marked else f"<i>{escape(text)}</i>")
        last = position
    return "".join(parts)


def _options(names: Sequence[str], chosen: str) -> str:
    return "".join(
        f'<option value="{escape(name)}"{" selected" if name == chosen else ""}>{escape(name)}</option>'
        for name in names
    )

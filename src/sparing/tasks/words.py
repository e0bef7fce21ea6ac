"""The words of which the synthetic tasks make their keys ("golden bridge") and word values.

Plain English words that the bundled model's tokenizer holds as one token each, with a leading space (and,
for adjectives, without one: they open the quoted keys of the key-value tasks).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

_ADJECTIVES = """
amber ancient bitter black blind blue bold brave brief bright brilliant broad broken brown busy calm
careful cheerful clean clear clever cold common content cool crimson curious dark deep distant double
dull eager early easy empty equal evil false famous fast fierce final firm flat foreign fresh gentle
golden grand gray great green happy heavy hidden hollow holy honest huge humble hungry idle iron large
lonely loose loud lovely lower mild modern narrow noble open pale patient plain polite proud purple
quick quiet rapid rare ready red rich rough round royal sacred secret sharp short silent silver simple
slow small smooth soft solid square steady steep strange strong sudden sweet tall tender thick thin tiny
vast warm weary white wide wild wise wooden yellow young
"""

_NOUNS = """
angel army arrow basket battle beard bell bird boat book bottle bread bridge brother candle captain
carriage castle chain chair church circle city clock cloud coat coffee colour corner cottage country
court crown dance dinner doctor door dream dress engine farmer feather field finger fire fish flower
forest fountain friend garden gate glass grass guitar hall hammer harbour hat hill horse hotel house
island jacket judge kettle king kitchen knife ladder lady lake lamp letter library lion market mirror
money moon morning mountain music nation needle night ocean office orange painter palace paper picture
pilot pipe planet pocket prince prison queen rain ring river road roof school shadow ship shop silk
singer smoke snow soldier song spring squire stone storm story street summer sword table teacher temple
thunder tiger tower train tree valley village voyage wagon wall water window winter wolf
"""

ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
NOUNS: tuple[str, ...] = tuple(_NOUNS.split())


def shuffled_keys(rng: random.Random) -> Iterator[str]:
    """Yield every key ("amber river") in random order; those in a row share no word for as long as the words last.

    With thousands of words, as in RULER, keys that share one are rare; with a short list they would be the rule.
    """
    adjectives, nouns = rng.sample(ADJECTIVES, len(ADJECTIVES)), rng.sample(NOUNS, len(NOUNS))
    for shift in range(len(nouns)):
        for place, adjective in enumerate(adjectives):
            yield f"{adjective} {nouns[(place + shift) % len(nouns)]}"

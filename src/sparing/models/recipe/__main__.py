"""Make the bundled model: tokenizer, training (goes on where it was stopped), export, evaluation, card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sparing.models.recipe.card import write_card
from sparing.models.recipe.encoding import Encoder
from sparing.models.recipe.evaluate import evaluate
from sparing.models.recipe.export import export
from sparing.models.recipe.network import Shape
from sparing.models.recipe.samples import Source
from sparing.models.recipe.tokenization import books, load_corpus, train_tokenizer
from sparing.models.recipe.train import CURRICULUM, SEED, Trainer


def _prepare(texts: Path, out: Path) -> tuple[Tokenizer, np.ndarray]:
    """Return tokenizer and training ids, made on the first run and read on later ones."""
    path, ids = out / "tokenizer.json", out / "train_ids.npy"
    if not ids.exists():
        train_tokenizer(books(texts, held_out=False)).save(str(path))
        np.save(ids, load_corpus(Tokenizer.from_file(str(path)), texts, held_out=False))
    return Tokenizer.from_file(str(path)), np.load(ids)


def main() -> None:
    """Run the recipe."""
    parser = argparse.ArgumentParser(prog="python -m sparing.models.recipe", description=__doc__)
    parser.add_argument("--texts", type=Path, required=True, help="folder of the books, one .txt file each")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and model/")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile (slower)")
    parser.add_argument("--count", type=int, default=200, help="samples per measurement")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer, ids = _prepare(options.texts, options.out)
    source = Source(Encoder(tokenizer), ids)
    trainer = Trainer(source, Shape(), options.seed, compiled=not options.no_compile)
    if (options.out / "checkpoint.pt").exists():
        trainer.load(options.out / "checkpoint.pt")
    trainer.run(CURRICULUM, options.out)
    model = options.out / "model"
    export(trainer.network, tokenizer, model)
    results = evaluate(model, options.texts, options.count)
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    write_card(model, results, trainer.shape)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

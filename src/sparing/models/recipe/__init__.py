"""How the bundled model was made: tokenizer, data, network, training, export, evaluation, model card.

`python -m sparing.models.recipe --texts FOLDER --out FOLDER` runs all of it.
"""

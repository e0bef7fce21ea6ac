"""sparing against TransformerLens: activation and attribution patching of all heads, time and peak memory.

First both have to give the same scores in float64, on the models and pairs that are measured (the pairs shortened).
Then each works in a process of its own on one thread of one core, and the two take turns. TransformerLens lives in
an environment of its own, made on the first run in a folder that git ignores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from common import Time, conditions, header_text, median_ratio, medians, table, use_threads, write
from tokenizers import Tokenizer, models

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parent / ".bench-lens"
PACKAGES = ["transformer-lens==4.3.0", "transformers==5.23.0", "torch==2.13.0"]
# layers, hidden, intermediate, query heads, KV heads, vocabulary
SHAPES = {"3m": (4, 256, 688, 8, 2, 1000), "125m": (12, 768, 2048, 12, 4, 32000)}
# Where the first changed token stands, as a share of the prompt. TransformerLens does not care; sparing does.
PAIRS = {"start": 0.0, "middle": 0.5}
GATE_TOKENS = 48
SIDES = ("transformer_lens", "sparing")


# -- what is measured -----------------------------------------------------------------------------------------------


def random_model(size: str, folder: str, seed: int) -> Any:
    """A Llama with random weights, and a tokenizer since TransformerLens wants one, saved in a folder."""
    layers, hidden, intermediate, query_heads, kv_heads, vocabulary = SHAPES[size]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=query_heads, num_key_value_heads=kv_heads, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    words = models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0")
    special = {"bos_token": "w1", "eos_token": "w2", "pad_token": "w2"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(folder)
    model.save_pretrained(folder)
    return model


def random_pair(model: Any, tokens: int, start: float, seed: int) -> dict[str, Any]:
    """Prompts that differ in every fourth token from `start` on and in the last one, and the two tokens whose logits
    they pull apart most; `scale` is the largest logit over the difference that they make.
    """
    g = torch.Generator().manual_seed(seed)
    clean, other = torch.randint(3, model.config.vocab_size, (2, tokens), generator=g)
    changed = torch.arange(tokens) >= int(start * tokens)
    changed &= (torch.arange(tokens) - int(start * tokens)) % 4 == 0
    changed[-1] = True
    corrupt = torch.where(changed, other, clean)
    with torch.no_grad():
        first, second = (model(ids[None], logits_to_keep=1).logits[0, -1] for ids in (clean, corrupt))
    answer, wrong = int((first - second).argmax()), int((first - second).argmin())
    gap = float(first[answer] - first[wrong] - second[answer] + second[wrong])
    largest = float(torch.stack([first, second]).abs().max())
    ids = {"clean": clean.tolist(), "corrupt": corrupt.tolist()}
    return {**ids, "answer": answer, "wrong": wrong, "scale": largest / gap}


class Side:
    """One library's process."""

    def __init__(self, name: str, setting: dict[str, Any]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        if name != "sparing":
            environment.pop("PYTHONPATH", None)
        python = sys.executable if name == "sparing" else _lens_python()
        self.name = name
        self.process = subprocess.Popen(
            [python, str(HERE / "patching_driver.py"), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.versions = self.ask(setting)["versions"]

    def ask(self, request: dict[str, Any]) -> Any:
        """One request and its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} process ended; see its message above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def _lens_python() -> str:
    """The interpreter of TransformerLens' environment, which is made if it is not there."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return str(python)


# -- the same scores? -----------------------------------------------------------------------------------------------


def tolerance(size: str, scale: float, dtype: str, tokens: int) -> float:
    """How far scores of the same thing may be apart.

    On the way to the logits there are 2 L + 1 norms in a row. In float64 these alone round to float32 (2^-24 of their
    size); in float32 every sum of n terms rounds, by about sqrt(n) 2^-24. Of such errors a score has one in each of
    two logits, in the patched run and in the run it is compared with, on both sides: 8 times, over the gap.
    """
    layers, hidden, intermediate = SHAPES[size][:3]
    terms = 1 if dtype == "float64" else max(hidden, intermediate, tokens)
    return 8 * (2 * layers + 1) * math.sqrt(terms) * 2.0**-24 * scale


def apart(first: Any, second: Any) -> float:
    """The largest difference of two tables of scores."""
    return float((torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)).abs().max())


def check(name: str, found: float, allowed: float, largest: float) -> dict[str, float]:
    """Stop if the two do not compute the same."""
    if not found <= allowed < largest / 10:
        raise SystemExit(f"{name}: scores up to {largest:g} differ by {found:g}, {allowed:g} allowed; nothing is timed")
    return {"differ": found, "allowed": allowed, "largest": largest}


def compared(size: str, name: str, pair: dict[str, Any], dtype: str, one: Any, other: Any) -> dict[str, float]:
    """`check` of two tables of scores."""
    allowed = tolerance(size, pair["scale"], dtype, len(pair["clean"]))
    return check(f"{size} {name} {dtype}", apart(one, other), allowed, float(torch.tensor(one).abs().max()))


def gate(size: str, model: Any, setting: dict[str, Any], seed: int) -> dict[str, Any]:
    """Both libraries in float64 on short prompts: the largest differences."""
    pairs = {name: random_pair(model, GATE_TOKENS, start, seed) for name, start in PAIRS.items()}
    sides = {name: Side(name, {**setting, "dtype": "float64", "pairs": pairs}) for name in SIDES}
    found = {}
    for name, pair in pairs.items():
        for work in ("activation", "attribution", "tool"):
            lens = sides["transformer_lens"].ask({"do": work, "pair": name})["scores"]
            mine = sides["sparing"].ask({"do": "attribution" if work == "tool" else work, "pair": name})["scores"]
            found[f"{work} {name}"] = compared(size, f"{work} {name}", pair, "float64", lens, mine)
    for side in sides.values():
        side.close()
    return found


# -- measuring ------------------------------------------------------------------------------------------------------


def measure(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """The gate, then all rounds of one model."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(size, folder, args.seed)
        setting = {"folder": folder, "core": args.core}
        agreement = gate(size, model, setting, args.seed)
        pairs = {name: random_pair(model, args.tokens, start, args.seed) for name, start in PAIRS.items()}
        sides = {name: Side(name, {**setting, "dtype": "float32", "pairs": pairs}) for name in SIDES}
        answers: dict[str, list[Any]] = {}
        for number in range(args.rounds):
            for pair in PAIRS:
                for work in ("activation", "attribution"):
                    for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                        answer = sides[side].ask({"do": work, "pair": pair})
                        answers.setdefault(f"{work} {pair} {side}", []).append(answer)
                        print(size, number, work, pair, side, f"{answer['cpu']:.1f} s CPU", file=sys.stderr, flush=True)
        tool = sides["transformer_lens"].ask({"do": "tool", "pair": "start"})
        used = {name: side.versions for name, side in sides.items()}
        for side in sides.values():
            side.close()
        peaks = peaks_of({**setting, "dtype": "float32", "pairs": pairs})
    rows = [
        row(size, work, pair, pairs[pair], answers, peaks) for work in ("activation", "attribution") for pair in PAIRS
    ]
    return {
        "size": size, "gate": agreement, "rows": rows, "versions": used,
        "tool": {"wall": tool["wall"], "cpu": tool["cpu"], "peak": peaks["tool start transformer_lens"]},
    }  # fmt: skip


def peaks_of(setting: dict[str, Any]) -> dict[str, int]:
    """The peak of each work in a new process, in bytes above the loaded model.

    TransformerLens' forwards are all alike, so those of two layers are enough; more of them could only take more.
    """
    found = {}
    works = [(work, pair, side) for work in ("activation", "attribution") for pair in PAIRS for side in SIDES]
    for work, pair, name in [*works, ("tool", "start", "transformer_lens")]:
        side = Side(name, setting)
        short = " of 2 layers" if (work, name) == ("activation", "transformer_lens") else ""
        found[f"{work} {pair} {name}"] = side.ask({"do": work + short, "pair": pair, "peak": True})["peak"]
        side.close()
    return found


def row(
    size: str, work: str, name: str, pair: dict[str, Any], answers: dict[str, list[Any]], peaks: dict[str, int]
) -> dict[str, Any]:
    """Medians and ratios of one kind of patching on one pair."""
    found = {side: answers[f"{work} {name} {side}"] for side in SIDES}
    times = {side: [Time(answer["wall"], answer["cpu"]) for answer in found[side]] for side in SIDES}
    peak = {side: peaks[f"{work} {name} {side}"] for side in SIDES}
    lens, mine = (found[side][0]["scores"] for side in SIDES)
    return {
        "work": work, "pair": name, "float32": compared(size, f"{work} {name}", pair, "float32", lens, mine),
        "times": {side: medians(times[side]) for side in SIDES}, "peaks": peak,
        "faster": median_ratio(times["transformer_lens"], times["sparing"]),
        "faster_wall": median_ratio(times["transformer_lens"], times["sparing"], "wall"),
        "memory": peak["sparing"] / peak["transformer_lens"],
        "rounds": {side: [[time.wall, time.cpu] for time in times[side]] for side in SIDES},
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The result as text."""
    header = ["model", "patching", "first change", "TransformerLens CPU s", "sparing CPU s", "faster", "(wall)",
              "TransformerLens MiB", "sparing MiB", "memory", "largest difference"]  # fmt: skip
    cells = [
        [
            each["size"], row["work"], row["pair"],
            *(f"{row['times'][side]['cpu_ms'] / 1000:.2f}" for side in SIDES),
            f"{row['faster']:.2f} x", f"{row['faster_wall']:.2f} x",
            *(f"{row['peaks'][side] / 2**20:.0f}" for side in SIDES), f"{row['memory']:.2f}",
            f"{row['float32']['differ']:.1e} of {row['float32']['largest']:.2f}",
        ]
        for each in result["models"]
        for row in each["rows"]
    ]  # fmt: skip
    lens = ", ".join(
        f"{name} {version}" for name, version in result["models"][0]["versions"]["transformer_lens"].items()
    )
    gates = [found for each in result["models"] for found in each["gate"].values()]
    tools = ", ".join(f"{each['tool']['cpu']:.1f} s and {each['tool']['peak'] / 2**20:.0f} MiB ({each['size']})"
                      for each in result["models"])  # fmt: skip
    return "\n".join(
        [
            header_text("Patching all heads: sparing against TransformerLens", result),
            f"- TransformerLens' environment: {lens}",
            f"- Random Llamas with GQA, float32, prompts of {result['tokens']} tokens that differ in every fourth one "
            f"from the start or from the middle on; medians of {result['rounds']} rounds; ratios within a round",
            "- MiB: peak of a new process above the loaded model",
            f"- In float64 ({GATE_TOKENS} tokens) scores differ by at most "
            f"{max(found['differ'] for found in gates):.1e}, {min(found['allowed'] for found in gates):.1e} allowed",
            f"- TransformerLens' attribution is its caches and one product per layer. Its `attribution_patch`, which "
            f"scores every position, takes {tools}",
            "",
            table(header, cells),
        ]
    )  # fmt: skip


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=0, help="the core that both processes are pinned to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="patching", help="topic in the names of the result files")
    args = parser.parse_args()
    use_threads(1)
    found = [measure(size, args) for size in args.sizes]
    result = {
        **conditions(args.seed), "tokens": args.tokens, "rounds": args.rounds,
        "core": args.core, "models": found,
    }  # fmt: skip
    write(args.name, result, markdown(result))


if __name__ == "__main__":
    main()

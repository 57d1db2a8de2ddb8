"""What critiques are worth to a reward model in the lab: the same pairs with critiques, with those of other answers, without.

python tests/benchmarks/critiques.py --out runs/critiques --json critiques.json
python tests/benchmarks/critiques.py --out runs/critiques-smollm2 --json smollm2.json --smollm2 FOLDER

One world of lists (two layers of 64), 1,500 pairs as the crowd labelled them; every part starts from the same SFT model. Or, with
a folder or GGUF of SmolLM2-135M-Instruct, the world of instructions: 240 pairs of its own answers, LoRA as in the lab's recipe.

- `bt`: no critiques. `bt, twice as long`: as many steps as the others, whose model is trained twice.
- `critique`: a first model learns the lab's truthful critiques beside the pair loss, writes one of every training answer, and goes
  on with its own. `given`: that first model as it is, without the second training.
- `shuffled`: the same, the given critiques dealt out anew over all answers. Whatever critiques tell of *this* answer is gone.
- `oracle`: the model of `critique`, read behind the lab's own critiques of the held-out answers. No model could write better ones.

Accuracy by the true reward on held-out pairs of the same writers (`held_out`) and about kinds that no annotator was asked about (`kinds`);
`truthful`: share of the phrases of its critiques of held-out answers that are those of the lab; `endless`: share that never ended.
Differences to `bt` are paired: by seed (t over seeds: head, order, dropout, samples), or with one seed by pair (t over pairs, which
says nothing of other seeds). Finished parts are kept in OUT, so several processes may share the parts among them (`--parts`).
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from datasets import Dataset
from torch import Tensor
from transformers import set_seed
from trl import RewardConfig
from worlds import Rows, decided, in_true_order, interval, reward_settings, world

from rlhf import CritiqueRewardTrainer, PairRewardTrainer
from rlhf.data.rows import CRITIQUES, SIDES, answer, asked
from rlhf.files import read_jsonl
from rlhf.lab.worlds import INSTRUCTIONS
from rlhf.models.critiques import REQUEST, critique_ids
from rlhf.models.heads import language_head
from rlhf.models.load import build_reward_model, load_tokenizer, model_settings
from rlhf.models.text import plain
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.critique_model import CritiqueRewardModel
from rlhf.reward.critiques import ENDED
from rlhf.reward.denoise import flip_pair
from rlhf.reward.model import RewardModel
from rlhf.reward.trainer import training_columns

SIZES = {"pairs": 1500, "test_pairs": 300, "demonstrations": 1500, "hidden_size": 64, "num_hidden_layers": 2}
QUICK = {"pairs": 150, "test_pairs": 50, "demonstrations": 200, "hidden_size": 32, "num_hidden_layers": 1}
SMOLLM2 = {"pairs": 240, "test_pairs": 120, "answers": 2}
INSTRUCTIONS_RECIPE = Path(__file__).parents[2] / "recipes" / "lab" / "instructions.yaml"
TOKENS = 40
PARTS = ("bt", "bt, twice as long", "given", "critique", "critique, mean of 4", "oracle", "shuffled")


class Base(NamedTuple):
    """What every part is built on and trained with: a folder, LoRA or none, learning rate, pairs a step."""

    folder: Path
    model: dict[str, Any]
    learning_rate: float
    batch: int


def settings(base: Base, seed: int, epochs: int) -> RewardConfig:
    """The same for every part."""
    args = reward_settings(base.learning_rate, epochs) | {"per_device_train_batch_size": base.batch}
    return RewardConfig(
        tempfile.mkdtemp(), **args, seed=seed, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip


def tokenizer_and_model(base: Base) -> tuple[Any, Any]:
    """The tokenizer and a reward model that is not trained."""
    tokenizer = load_tokenizer(base.folder, conversational=True)
    model = build_reward_model(base.folder, model_settings(base.model), pad_token_id=tokenizer.pad_token_id)
    return tokenizer, model


def without(base: Base, rows: Rows, seed: int, epochs: int) -> RewardModel:
    """A reward model that writes nothing."""
    set_seed(seed)
    tokenizer, model = tokenizer_and_model(base)
    data = Dataset.from_list(training_columns(rows))
    trainer = PairRewardTrainer(model, settings(base, seed, epochs), train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return RewardModel(trainer.model.eval(), tokenizer, conversational=True)


def critic(
    base: Base, rows: Rows, seed: int, epochs: int, start: CritiqueRewardModel | None = None
) -> CritiqueRewardModel:
    """A reward model trained on pairs with critiques, from SFT or from another one's weights."""
    set_seed(seed)
    tokenizer, model = tokenizer_and_model(base)
    data = Dataset.from_list(
        [{name: row[name] for name in ("prompt", *SIDES, *CRITIQUES, *ENDED) if name in row} for row in rows]
    )
    head = language_head(base.folder, model_settings(base.model))
    trainer = CritiqueRewardTrainer(
        model, settings(base, seed, epochs), language_head=head, train_dataset=data, processing_class=tokenizer
    )
    if start is not None:
        trainer.model.load_state_dict(start.model.state_dict())
    trainer.train()
    form: Any = {"request": REQUEST, "tokens": TOKENS, "samples": 1}
    return CritiqueRewardModel(
        trainer.model.eval(), tokenizer, writer=trainer.writer.eval(), form=form, conversational=True
    )


def with_own(model: CritiqueRewardModel, rows: Rows) -> Rows:
    """The same pairs with critiques that the model writes of their answers."""
    found = []
    for side, name, ended in zip(SIDES, CRITIQUES, ENDED, strict=True):
        written = model.write(encoded(model, rows, side), sample=0)
        found.append((name, model.tokenizer.batch_decode(written.rows, skip_special_tokens=True), ended, written.ended))
    return [
        {**row, **{name: texts[i] for name, texts, _, _ in found}, **{ended: flags[i] for _, _, ended, flags in found}}
        for i, row in enumerate(rows)
    ]


def shuffled(rows: Rows, seed: int) -> Rows:
    """The same pairs, their critiques dealt out anew over all answers."""
    texts = [row[name] for row in rows for name in CRITIQUES]
    random.Random(seed).shuffle(texts)
    return [{**row, **dict(zip(CRITIQUES, texts[2 * i : 2 * i + 2], strict=True))} for i, row in enumerate(rows)]


def encoded(model: RewardModel, rows: Rows, side: Any) -> list[list[int]]:
    """Token rows of one side."""
    return model.encode([asked(row, side) for row in rows], [answer(row, side) for row in rows], None)


def behind_given(model: CritiqueRewardModel, rows: Rows, side: Any) -> Tensor:
    """Scores of one side behind the critiques that the rows have."""
    texts = [row[f"critique_{side}"] for row in rows]
    critiques = critique_ids(model.tokenizer, texts, [True] * len(texts))
    read = [[*row, *model.request, *x] for row, x in zip(encoded(model, rows, side), critiques, strict=True)]
    return model.score_at_end(read)


def measured(sets: dict[str, Rows], score: Callable[[Rows, Any], Tensor]) -> dict[str, Any]:
    """Accuracy on every set, which pairs were right (0 or 1), and milliseconds of a score."""
    found: dict[str, Any] = {"right": {}}
    begin, count = time.process_time(), 0
    for name, rows in sets.items():
        found["right"][name] = (score(rows, "chosen") > score(rows, "rejected")).int().tolist()
        found[name] = statistics.fmean(found["right"][name])
        count += 2 * len(rows)
    return found | {"milliseconds": 1000 * (time.process_time() - begin) / count}


def gain(rows: list[dict[str, Any]], base: list[dict[str, Any]], name: str) -> list[float]:
    """Points of accuracy above `base` with their 95 % interval: over seeds, or with one seed over pairs."""
    if len(rows) == 1:
        return interval([100.0 * (a - b) for a, b in zip(rows[0]["right"][name], base[0]["right"][name], strict=True)])
    return interval([100 * (a[name] - b[name]) for a, b in zip(rows, base, strict=True)])


def of_model(model: RewardModel) -> Callable[[Rows, Any], Tensor]:
    """Its scores of one side."""
    return lambda rows, side: model.score_rows(encoded(model, rows, side))


def truth(model: CritiqueRewardModel, rows: Rows) -> dict[str, float]:
    """How many phrases of its critiques are those of the lab, and how many critiques never end."""
    right, ended = [], []
    for side, name in zip(SIDES, CRITIQUES, strict=True):
        written = model.write(encoded(model, rows, side))
        texts = model.tokenizer.batch_decode(written.rows, skip_special_tokens=True)
        for text, row in zip(texts, rows, strict=True):
            said, wanted = (set(x.strip(".").split(", ")) for x in (text, row[name]))
            right.append(len(said & wanted) / len(wanted))
        ended += written.ended
    return {"truthful": statistics.fmean(right), "endless": 1 - statistics.fmean(ended)}


def without_critiques(
    base: Base, pairs: Rows, sets: dict[str, Rows], seed: int, epochs: int
) -> dict[str, dict[str, Any]]:
    """Bradley-Terry, once and with as many steps as two trainings have."""
    found: dict[str, dict[str, Any]] = {}
    for name, times in (("bt", 1), ("bt, twice as long", 2)):
        begin = time.process_time()
        plain = without(base, pairs, seed, times * epochs)
        found[name] = {"seconds": time.process_time() - begin, **measured(sets, of_model(plain))}
    return found


def with_critiques(base: Base, pairs: Rows, sets: dict[str, Rows], seed: int, epochs: int) -> dict[str, dict[str, Any]]:
    """Both trainings on the lab's critiques, and what is made of the last model."""
    begin = time.process_time()
    first = critic(base, pairs, seed, epochs)
    seconds = time.process_time() - begin
    found = {"given": {"seconds": seconds, **measured(sets, of_model(first)), **truth(first, sets["held_out"])}}
    print(seed, found, flush=True)
    begin = time.process_time()
    last = critic(base, with_own(first, pairs), seed, epochs, start=first)
    seconds += time.process_time() - begin
    found["critique"] = {"seconds": seconds, **measured(sets, of_model(last)), **truth(last, sets["held_out"])}
    found["oracle"] = {"seconds": seconds, **measured(sets, partial(behind_given, last))}
    if not base.model:  # a real model takes an hour for them
        last.form = {**last.form, "samples": 4}
        found["critique, mean of 4"] = {"seconds": seconds, **measured(sets, of_model(last))}
    return found


def with_shuffled(base: Base, pairs: Rows, sets: dict[str, Rows], seed: int, epochs: int) -> dict[str, dict[str, Any]]:
    """Both trainings on critiques of other answers."""
    begin = time.process_time()
    first = critic(base, shuffled(pairs, seed), seed, epochs)
    last = critic(base, with_own(first, pairs), seed, epochs, start=first)
    seconds = time.process_time() - begin
    return {"shuffled": {"seconds": seconds, **measured(sets, of_model(last)), **truth(last, sets["held_out"])}}


def instructions(out: Path, model: Path, *, quick: bool) -> tuple[Base, Rows, Rows]:
    """The world of instructions: the model, its answers as the crowd compared them, and held-out ones."""
    sizes = {"pairs": 100, "test_pairs": 50} if quick else SMOLLM2
    command = [sys.executable, "-m", "rlhf", "run", str(INSTRUCTIONS_RECIPE), "--out", str(out), "--until", "data"]
    command += [
        f"backbone.model={model}",
        "lab.critiques=true",
        *(f"lab.{name}={value}" for name, value in sizes.items()),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    recipe = yaml.safe_load(INSTRUCTIONS_RECIPE.read_text())["reward"]
    made = out / "round-0/base/model"
    lora = {name: value for name, value in recipe.items() if name.startswith(("lora", "use_peft"))}
    base = Base(made if made.is_dir() else model, lora, recipe["learning_rate"], 8)
    pairs, test = (read_jsonl(out / "round-0/data/data" / f"{name}.jsonl") for name in ("pairs", "test_pairs"))
    return base, pairs, test


def true_order_of_instructions(rows: Rows) -> Rows:
    """The pairs whose true rewards differ, the better answer chosen."""
    prompts = [plain(row["prompt"]) for row in rows]
    chosen, rejected = (INSTRUCTIONS.gold(prompts, [answer(row, side) for row in rows]) for side in SIDES)
    return [row if a > b else flip_pair(row) for row, a, b in zip(rows, chosen, rejected, strict=True) if a != b]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/critiques"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--parts", default="without_critiques,with_critiques,with_shuffled")
    parser.add_argument("--epochs", type=int, default=1, help="of every training; OUT holds the parts of one number")
    parser.add_argument("--smollm2", type=Path, help="a folder or GGUF: the world of instructions")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, to see whether it runs")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.smollm2 is None:
        folder, pairs, test = world(
            arguments.out / "world", 0, **(QUICK if arguments.quick else SIZES), critiques="true"
        )
        base, order = Base(folder, {}, 3e-3, 16), in_true_order
    else:
        base, pairs, test = instructions(arguments.out / "world", arguments.smollm2, quick=arguments.quick)
        order = true_order_of_instructions
    shifted = read_jsonl(arguments.out / "world/round-0/lab/data/shift_test.jsonl")
    kinds = decided(shifted) if arguments.smollm2 is None else shifted
    sets = {"held_out": order(test), "kinds": order(kinds)}
    print({name: len(rows) for name, rows in sets.items()} | {"train": len(pairs)}, flush=True)

    table: dict[str, list[dict[str, Any]]] = {}
    parts = {part.__name__: part for part in (without_critiques, with_critiques, with_shuffled)}
    for seed in map(int, arguments.seeds.split(",")):
        for part in arguments.parts.split(","):
            file = arguments.out / f"{part}-{seed}.json"
            if not file.is_file():
                file.write_text(json.dumps(parts[part](base, pairs, sets, seed, arguments.epochs)))
                print(seed, file.read_text(), flush=True)
            for name, row in json.loads(file.read_text()).items():
                table.setdefault(name, []).append(row)

    arguments.json.write_text(json.dumps(table, indent=1))
    others = {"bt": "bt", "bt, twice as long": "longer", "shuffled": "shuffled"}
    others = {name: shown for name, shown in others.items() if name in table}
    columns = [f"{key} − `{shown}`" for shown in others.values() for key in sets]
    print("| part | held_out | kinds | " + " | ".join([*columns, "truthful", "endless", "s", "ms"]) + " |")
    print("|---" * (7 + len(columns)) + "|")
    for name in [name for name in PARTS if name in table]:
        mean = {key: statistics.fmean(row[key] for row in table[name]) for key in table[name][0] if key != "right"}
        gains = [gain(table[name], table[other], key) if other != name else None for other in others for key in sets]
        shown = ["" if found is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*found) for found in gains]
        shown += [f"{mean[key]:.2f}" if key in mean else "" for key in ("truthful", "endless")]
        accuracy = f"{mean['held_out']:.3f} | {mean['kinds']:.3f}"
        print(f"| {name} | {accuracy} | {' | '.join(shown)} | {mean['seconds']:.0f} | {mean['milliseconds']:.1f} |")


if __name__ == "__main__":
    main()

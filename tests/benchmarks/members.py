"""What every member of the reward-model family is worth in the lab: one table, from one command.

python tests/benchmarks/members.py --out runs/members --json members.json --seeds 10,11,12,13

A seed draws a whole world anew (`members_world.py`): prompts, answers, the crowd's labels, SFT model and policy, and head, order and
dropout of every member. A member is the keys that a recipe would have under `reward`; it is trained by the pipeline's own stage,
from SFT, on as many of the crowd's comparisons as every other, in as many steps; and judged by the true reward on

  held_out  pairs of the same writers,
  policy    pairs of answers of a policy, after a short PPO against a reward model (`bt`, another head and order),
  kinds     pairs about kinds of things that no annotator was asked about.

`ece`: σ|d| of the held-out pairs against how often it is right. `length`: Spearman's correlation of scores with the answers' tokens
over all held-out answers. Seconds of a training (with its vote or its critiques) and milliseconds of a score are of one processor.
Differences to `bt` are paired by seed (t over seeds); a star: still there when all rows of its column are corrected after Holm.
Finished parts are kept in OUT, so an interrupted run goes on, and the table is of the seeds that it was called with.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from members_world import REWARD, lived_in, prepared
from scipy.stats import spearmanr, ttest_1samp
from shift import holm
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from worlds import RECIPE, Rows, interval

import rlhf.pipeline.reward as stage
from rlhf import load_reward_model
from rlhf.evaluation.verdicts import compare_pairs
from rlhf.lab.world import gold
from rlhf.models.load import load_tokenizer
from rlhf.models.score import Scorer
from rlhf.models.text import plain
from rlhf.models.verdicts import load_verdict_model
from rlhf.pipeline.combine import combine_models
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.training import quiet_libraries
from rlhf.pipeline.vote import run_vote
from rlhf.recipe import load_recipe
from rlhf.recipe.objectives import EXTRAS, OBJECTIVES
from rlhf.report.records import MANIFEST
from rlhf.reward.ensemble import load_scorer_of, member_folders
from rlhf.statistics import expected_calibration_error

SETS = ("held_out", "policy", "kinds")
LONG_ENOUGH = 1024  # tokens of a question with two answers
SEEDS_APART = 100  # from the reward model that the policy was made against


@dataclass(frozen=True)
class Member:
    """A row of the table: what a recipe has under `reward`, and which labels it reads.

    Attributes:
        keys: as on a command line, without `reward.`; `{labels}` is the folder of all forms.
        form: of the labels, by the name of its folder.
        beside: another row that it is compared with too.
    """

    keys: tuple[str, ...] = ()
    form: str = "pairs"
    beside: str | None = None


# As many steps for all: 16 pairs have the answers of 32 ratings, and about the pairs of 3 rankings.
RATINGS = ("attributes={things: 1, number: 1, refusal: 1, manner: 1, brevity: 1}", "per_device_train_batch_size=32")
# LoRA at the rate of recipes/lab/experts.yaml.
LORA = ("use_peft=true", "lora_r=16", "lora_alpha=32", "lora_target_modules=[all-linear]", "learning_rate=2.0e-3")
BY_RANKS = ("per_device_train_batch_size=3",)
MEMBERS: dict[str, Member] = {
    "bt": Member(),
    "bt, centred": Member(("center_rewards_coefficient=0.01",)),
    "bt, group_weight: prompt": Member(("group_weight=prompt",)),
    "likelihood of flips": Member(("flip_rate=0.2",)),
    "smoothing": Member(("objective=smoothing",)),
    "soft, three labels of a third": Member(("objective=soft", "num_train_epochs=3"), "thirds"),
    "margin of ratings": Member(("objective=margin",)),
    "scaled by ratings": Member(("objective=scaled",)),
    **{name: Member((f"objective={name}",)) for name, row in OBJECTIVES.items() if row.needs.vote},
    "bt on rankings": Member(form="rankings"),
    "plackett_luce": Member(("objective=plackett_luce", *BY_RANKS), "rankings", "bt on rankings"),
    "kwise": Member(("objective=kwise", *BY_RANKS), "rankings", "bt on rankings"),
    "regression": Member(("objective=regression", *RATINGS)),
    "regression, then bt": Member(("ratings_first=true", RATINGS[0])),
    "gated": Member(("objective=gated", *RATINGS), beside="regression"),
    **{name: Member((f"extra={name}",)) for name in EXTRAS if name != "critique"},
    "critique": Member(("extra=critique", "critique_tokens=32")),
    "meta": Member(("meta=true", "meta_samples={labels}/meta.jsonl")),
    "bt, LoRA": Member(LORA),
    "experts by a gate": Member((*LORA, "experts=gate"), beside="bt, LoRA"),
    "mean of 3 members": Member(("members=3",)),
}
MERGED = "their weights' mean (WARM)"  # made of the members of the row before
UNTRAINED = ("verdicts of SFT", "longer wins", "shorter wins")


# ---- Training ----


@contextmanager
def timed(*names: str) -> Iterator[list[float]]:
    """Collect the processor seconds of some functions of the reward stage: what trains, without calibration and reports."""
    seconds: list[float] = []

    def clock(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            begin = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                seconds.append(time.process_time() - begin)

        return called

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(stage, name, clock(getattr(stage, name))))
        yield seconds


def context_of(name: str, member: Member, out: Path, seed: int, kind: str) -> StageContext:
    """What a stage of a run is given that has these keys, on the labels of this form; its folder is empty."""
    keys = [f"reward.{key.replace('{labels}', str(out / 'labels'))}" for key in member.keys]
    recipe = load_recipe(RECIPE, [f"seed={seed + SEEDS_APART}", *REWARD, *keys])
    folder = out / "work" / name.replace(" ", "-") / "round-1" / kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parents = {"data": out / "labels" / member.form, "sft": out / "world/round-0/sft"}
    if kind == "reward" and recipe.reward.needs_vote:
        parents["vote"] = voted(out, seed)
    return StageContext(recipe, folder, parents, say=lambda _: None)


def voted(out: Path, seed: int) -> Path:
    """The stage of the vote, which is the same for every objective that needs one; it is held once."""
    folder = out / "work/vote/round-1/vote"
    if not (folder / MANIFEST).is_file():
        context = context_of("vote", Member(), out, seed, "vote")
        begin = time.process_time()
        facts = run_vote(context)
        seconds = time.process_time() - begin
        (folder / MANIFEST).write_text(json.dumps({"key": "", "facts": {**facts, "processor_seconds": seconds}}))
    return folder


def trained(name: str, member: Member, out: Path, seed: int) -> tuple[dict[str, Scorer], float]:
    """The scorers that one training makes, by the row's name, and its seconds."""
    context = context_of(name, member, out, seed, "reward")
    with timed("fit_reward_model", "fit_and_keep", "own_critiques", "first_on_ratings", "_combine") as seconds:
        stage.run_reward(context)
    vote = context.find_parent("vote")
    if vote is not None:
        seconds.append(json.loads((vote / MANIFEST).read_text())["facts"]["processor_seconds"])
    made: dict[str, Scorer] = {name: load_scorer_of(context.folder)}
    folders = member_folders(context.folder)
    if len(folders) > 1:
        merged, samples = context.folder / "merged", out / "world/round-0/sft/samples.jsonl"
        combine_models(folders, [1 / len(folders)] * len(folders), merged, samples=samples)
        made[MERGED] = load_reward_model(merged)
    return made, sum(seconds)


# ---- Judging ----


class Length:
    """A scorer that counts tokens, times a sign."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sign: int):
        self.tokenizer, self.sign = tokenizer, sign

    def score(self, prompts: Any, responses: Any, *, ended: Any = None) -> Tensor:
        ids = self.tokenizer(list(responses), add_special_tokens=False)["input_ids"]
        return self.sign * torch.tensor([float(len(row)) for row in ids])


def measured(scorer: Scorer, sets: dict[str, Rows], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Accuracy by the true reward, calibration, how far scores follow length, and milliseconds of a score."""
    found: dict[str, float] = {}
    for name, rows in sets.items():
        prompts = [row["prompt"] for row in rows]
        answers = [[row[side][0]["content"] for row in rows] for side in ("chosen", "rejected")]
        begin = time.process_time()
        chosen, rejected = (scorer.score(prompts, side) for side in answers)
        seconds = time.process_time() - begin
        found[name] = (chosen > rejected).double().mean().item()
        if name == "held_out":
            d, texts = chosen - rejected, answers[0] + answers[1]
            found["ece"] = expected_calibration_error(d.abs().sigmoid().tolist(), (d > 0).double().tolist())
            found["milliseconds"] = 1000 * seconds / len(texts)
            tokens = Length(tokenizer, 1).score(None, texts)
            found["length"] = float(spearmanr(torch.cat([chosen, rejected]), tokens).statistic)
            true = gold([plain(prompt) for prompt in prompts * 2], texts)
            found["length_of_gold"] = float(spearmanr(true, tokens).statistic)
    return found


def untrained(name: str, sets: dict[str, Rows], base: Path) -> dict[str, float]:
    """The figures of what learns nothing from labels."""
    tokenizer = load_tokenizer(base, conversational=True)
    if name != "verdicts of SFT":
        found = measured(Length(tokenizer, 1 if name == "longer wins" else -1), sets, tokenizer)
        return {key: value for key, value in found.items() if key not in ("ece", "milliseconds")}
    model = load_verdict_model(str(base))
    # The question alone is longer than anything that SFT read, and than its context; rotary places go on.
    model.model.config.max_position_embeddings = model.tokenizer.model_max_length = LONG_ENOUGH
    found = {}
    for key, rows in sets.items():
        begin = time.process_time()
        verdicts = compare_pairs(model, rows)
        d = verdicts.orders.log_odds
        found[key] = (d > 0).double().mean().item()
        if key == "held_out":
            found["milliseconds"] = 1000 * (time.process_time() - begin) / len(rows)
            found["ece"] = expected_calibration_error(d.abs().sigmoid().tolist(), (d > 0).double().tolist())
            found["too_long"] = float((~verdicts.fits).sum())
            found["share"] = verdicts.share.mean().item()
    return found


def part(name: str, out: Path, seed: int, sets: dict[str, Rows]) -> dict[str, dict[str, float]]:
    """The rows of one training on one seed, kept on disk."""
    file = out / "parts" / f"{name}.json"
    if not file.is_file():
        base, begin = out / "world/round-0/sft/model", time.monotonic()
        if name in UNTRAINED:
            found = {name: untrained(name, sets, base)}
        else:
            made, seconds = trained(name, MEMBERS[name], out, seed)
            tokenizer = load_tokenizer(base, conversational=True)
            found = {row: {"seconds": seconds, **measured(scorer, sets, tokenizer)} for row, scorer in made.items()}
            shutil.rmtree(out / "work" / name.replace(" ", "-"))
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found))
        accuracies = {row: [round(figures[key], 3) for key in SETS] for row, figures in found.items()}
        print(f"seed {seed} in {time.monotonic() - begin:.0f} s: {accuracies}", flush=True)
    rows: dict[str, dict[str, float]] = json.loads(file.read_text())
    return rows


# ---- The table ----


def gains(rows: list[dict[str, float]], plain_rows: list[dict[str, float]], key: str) -> list[float]:
    """Differences in points, seed by seed."""
    return [100 * (row[key] - plain_row[key]) for row, plain_row in zip(rows, plain_rows, strict=True)]


def shown(values: list[float]) -> str:
    """Mean and half of its interval."""
    mean, low, _ = interval(values)
    return f"{mean:+.1f} ± {mean - low:.1f}"


def print_table(table: dict[str, list[dict[str, float]]]) -> None:
    """Every row, and the rows that are to be compared with another one than `bt`."""
    others = [name for name in table if name != "bt"]
    stars = {}
    for key in SETS:
        p_values = {name: float(ttest_1samp(gains(table[name], table["bt"], key), 0).pvalue) for name in others}
        stars[key] = {name for name, p in holm(p_values).items() if p < 0.05}
    heads = ["member", *SETS, *(f"{key} − `bt`" for key in SETS), "ECE", "length", "s", "ms"]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for name, rows in table.items():
        mean = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        cells = [f"{mean[key]:.3f}" for key in SETS]
        for key in SETS:
            star = "*" if name in stars[key] else ""
            cells.append("" if name == "bt" else shown(gains(rows, table["bt"], key)) + star)
        for key, form in (("ece", ".3f"), ("length", "+.2f"), ("seconds", ".1f"), ("milliseconds", ".1f")):
            cells.append(format(mean[key], form) if key in mean else "")
        print(f"| {name} | {' | '.join(cells)} |")
    for name, member in MEMBERS.items():
        if name in table and member.beside in table:
            cells = [f"{key} {shown(gains(table[name], table[member.beside], key))}" for key in SETS]
            print(f"{name} − {member.beside}: {', '.join(cells)}")
    if MERGED in table:
        cells = [f"{key} {shown(gains(table[MERGED], table['mean of 3 members'], key))}" for key in SETS]
        print(f"{MERGED} − the mean of their scores: {', '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/members"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="10,11,12,13")
    parser.add_argument("--members", help="names, separated by semicolons; all where it is left out")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, to see whether it runs")
    options = parser.parse_args()
    names = options.members.split(";") if options.members else [*MEMBERS, *UNTRAINED]
    quiet_libraries()
    torch.set_num_threads(1)

    table: dict[str, list[dict[str, float]]] = {}
    for seed in map(int, options.seeds.split(",")):
        out = options.out / f"seed-{seed}{'-quick' if options.quick else ''}"
        world = lived_in(out / "world", seed, quick=options.quick)
        sets = prepared(world, seed, out / "labels", quick=options.quick)
        print(f"seed {seed}: pairs to judge by", {name: len(rows) for name, rows in sets.items()}, flush=True)
        for name in names:
            for row, figures in part(name, out, seed, sets).items():
                table.setdefault(row, []).append(figures)

    options.json.write_text(json.dumps(table, indent=1))
    print_table(table)
    true = statistics.fmean(row["length_of_gold"] for row in table["bt"])
    count = len(SETS) * (len(table) - 1)
    print(f"true reward and length: {true:+.2f}; of {count} intervals {count / 20:.1f} leave 0 out by chance")


if __name__ == "__main__":
    main()

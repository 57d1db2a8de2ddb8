"""`rlhf verdict`: how often the first of two answers is better, from few labels of people and many of a judge."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.read import ReadReport, read_rows
from rlhf.errors import UserError
from rlhf.few_labels import FEWEST, Prompts, Rate, human_rate, powered_rate, rate_at_any_look
from rlhf.files import write_text
from rlhf.report.result_file import check_result_file

WORDS = {"first": 1.0, "tie": 0.5, "second": 0.0}
VERDICT = "first, second, tie or a number from 0 to 1"
SHOWN = 10  # problems of a file
LEAST_WIDTH = 1e-9  # of an interval that says something
DRAWS = 1000  # of labelled rows, to learn how many prompts they have
ODD_DRAW = 3.0  # standard errors between the judge's means of rows with and without a label, beyond which it is said


class Verdicts(NamedTuple):
    """What a file says, 1 for the first answer, 0 for the second.

    Attributes:
        human, judge: [n] of the rows with a label, in the file's order.
        judge_alone: [N] of the others.
        is_mixed: whether rows without a label stand before some with one, so that the order is not that of labelling.
        codes: columns whose numbers are 0 and 1 only, and so may be meant as numbers of answers.
        prompts: which rows have one `prompt`; a row without stands alone.
        skipped: how many of the others somebody saw and gave no verdict on.
    """

    human: list[float]
    judge: list[float]
    judge_alone: list[float]
    is_mixed: bool
    codes: list[str]
    prompts: Prompts
    skipped: int


def verdict(file: str, out: Path | None, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Estimate a win rate, and say it with what it rests on.

    Args:
        file: rows with `judge`, and with `label` where a person has labelled: first, second, tie, or a number in [0, 1], the
            probability that the first answer is better. Labelled rows are drawn at random and stand in the order of labelling.
            Rows with one `prompt` are not taken to be independent.
        out: where the result is written as JSON; an earlier result there is replaced.

    Raises:
        UserError: a row has no judge or what is no verdict; fewer than three labels; `out` holds something else.
    """
    if out is not None:
        check_result_file(out, "--out", key="win_rate_any_look_ci")

    # 1. What the file says, and whether its labelled rows may be a random draw.
    human, judge, alone, is_mixed, codes, prompts, skipped = read_verdicts(file)
    if codes:
        say(
            f"{' and '.join(f'`{name}`' for name in codes)}: 1 is read as 'the first answer is better', and 0 as 'the second'. If "
            "these numbers are the answers' places, write first and second; otherwise every rate here is turned round."
        )
    surprise = _surprise(judge, alone)
    if abs(surprise) > ODD_DRAW:
        say(
            f"The judge says other things of rows with a label than of rows without ({surprise:+.1f} standard errors): if they "
            "were not drawn at random, no interval here holds."
        )

    if is_mixed:
        order = random.Random(0).sample(range(len(human)), len(human))
        human, judge = [human[i] for i in order], [judge[i] for i in order]
        prompts = Prompts([prompts.labelled[i] for i in order], prompts.alone)
        say(
            "Rows with and without a label stand mixed, so this is not the order of labelling. For the interval of any look the "
            "labels are taken in an order drawn at random, once; to look again and again put labelled rows first, in the order of "
            "labelling."
        )

    # 2. The rate by people, by the judge, and by both; for one look, and for any number.
    everything = [*judge, *alone]
    by_people, by_both = human_rate(human, prompts), powered_rate(human, judge, alone, prompts)
    if (different := len({*prompts.labelled, *prompts.alone})) < len(everything):
        say(
            f"{len(everything)} rows have {different} prompts: the intervals for one look take rows of one prompt together."
        )
    is_by_prompt = labelled_by_prompt(prompts)
    any_look = list(rate_at_any_look(human, judge, alone)[-1])
    result = {
        "labels": len(human),
        "rows": len(everything),
        "people": {"rate": by_people.mean, "rate_ci": _interval(by_people, human)},
        "judge": sum(everything) / len(everything),
        "win_rate": by_both.mean,
        "win_rate_ci": _interval(by_both, human),
        "win_rate_any_look_ci": None if is_by_prompt or math.isnan(any_look[0]) else any_look,
        "judge_weight": by_both.judge_weight,
        "draw_z": surprise,
        "labelled_by_prompt": is_by_prompt,
        "skipped": skipped,
    }
    for sentence in sentences(result):
        say(sentence)
    if out is not None:
        write_text(out, json.dumps(result, indent=1) + "\n")
    return result


def labelled_by_prompt(prompts: Prompts) -> bool:
    """Tell whether labels were given prompt by prompt: to rows of fewer prompts than as many rows drawn one by one have.

    Fewer than 99 of 100 such draws, from all rows of the file.

    >>> labelled_by_prompt(Prompts([0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]))
    True
    >>> labelled_by_prompt(Prompts([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]))
    False
    """
    rows, rng = [*prompts.labelled, *prompts.alone], random.Random(0)
    if len(set(rows)) == len(rows) or not prompts.alone:
        return False
    labelled = len(set(prompts.labelled))
    as_few = sum(len(set(rng.sample(rows, len(prompts.labelled)))) <= labelled for _ in range(DRAWS))
    return as_few < DRAWS / 100


def sentences(result: dict[str, Any]) -> list[str]:
    """Return the result in words."""
    people, interval = result["people"], result["win_rate_ci"]
    lines = [
        f"The first answer wins {result['win_rate']:.3f}{_shown(interval)}: {result['rows']} verdicts of the judge, corrected by "
        f"{result['labels']} labels of people.",
        f"People alone: {people['rate']:.3f}{_shown(people['rate_ci'])}; the judge alone: {result['judge']:.3f}, which no interval "
        "makes true.",
    ]
    if interval is None or people["rate_ci"] is None:
        lines.append(
            "All labels say the same, or those of every prompt together do, so they have no spread to make an interval for one "
            "look of; read the next one."
        )
    else:
        width = (interval[1] - interval[0]) / (people["rate_ci"][1] - people["rate_ci"][0])
        lines.append(f"The interval is {width:.2f} times as wide as that of people alone.")
    if skipped := result["skipped"]:
        lines.append(
            f"{skipped} of the {skipped + result['labels']} rows that people saw were skipped, and count as rows that nobody saw. "
            "Who skips the hard ones leaves no random draw: then the rate is of rows like those with a label, and no interval "
            "here is one of all rows."
        )
    any_look = result["win_rate_any_look_ci"]
    if result["labelled_by_prompt"]:
        lines.append(
            "Labelled rows of one prompt stand together more often than rows that are drawn one by one do, so nothing holds at "
            "every look: that interval is for drawn rows, not for drawn prompts. The intervals for one look hold."
        )
    elif any_look is None:
        lines.append(
            "No rate is left that fits these labels in the order in which they stand, so they are no random draw in it (sorted "
            "rows?): nothing holds at every look. Put them in the order in which people labelled, or shuffle them."
        )
    else:
        lines.append(
            f"If you look again with more labels, and stop when it is clear:{_shown(any_look)}, for these rows."
        )
    return lines


def _shown(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"


def _interval(rate: Rate, human: Sequence[float]) -> list[float] | None:
    """Return an interval for one look; None where all labels, or those of every prompt together, are equal: a point is a lie."""
    return [rate.low, rate.high] if len(set(human)) > 1 and rate.high - rate.low > LEAST_WIDTH else None


def read_verdicts(file: str) -> Verdicts:
    """Read what judge and people say of every row.

    Raises:
        UserError: as `verdict`.
    """
    report = ReadReport(file)
    human, of_labelled, alone = list[float](), list[float](), list[float]()
    prompts_labelled, prompts_alone = list[str](), list[str]()
    is_mixed = has_open = False
    skipped = 0
    problems: list[str] = []
    numbers: dict[str, set[int | float]] = {"judge": set(), "label": set()}
    for number, row in read_rows(file, report):
        judge, label = (_value(row.get(name)) if isinstance(row, dict) else None for name in ("judge", "label"))
        if isinstance(row, dict):
            for name, seen in numbers.items():
                seen |= {row[name]} if isinstance(row.get(name), int | float) else set()
        prompt = row.get("prompt") if isinstance(row, dict) else None
        name = f"row {number}" if prompt is None else json.dumps(prompt, sort_keys=True, default=str)
        is_blank = not isinstance(row, dict) or row.get("label") in (None, "", "skip")
        if judge is None and (not isinstance(row, dict) or row.get("judge") in (None, "")):
            problems.append(f"{file}: row {number} has no `judge`, which is {VERDICT}.")
        elif judge is None:
            problems.append(f"{file}: row {number}: `judge` is {row['judge']!r:.40}; it must be {VERDICT}.")
        elif label is None and not is_blank:
            problems.append(f"{file}: row {number}: `label` is {row['label']!r:.40}; it must be {VERDICT}.")
        elif label is None:
            alone.append(judge)
            prompts_alone.append(name)
            is_skipped = row.get("label") == "skip"
            has_open |= not is_skipped  # who skips has seen the row in its turn
            skipped += is_skipped
        else:
            is_mixed |= has_open
            human.append(label)
            of_labelled.append(judge)
            prompts_labelled.append(name)
    codes = [name for name, seen in numbers.items() if seen and seen <= {0.0, 1.0}]
    problems += report.sentences()[1:] if report.dropped else []
    if not problems and len(human) < FEWEST:
        problems.append(f"{file}: {len(human)} of its rows have a `label`; at least {FEWEST} are needed.")
    if problems:
        more = len(problems) - SHOWN
        raise UserError(problems[:SHOWN] + ([f"{file}: {more} more rows like these."] if more > 0 else []))
    return Verdicts(human, of_labelled, alone, is_mixed, codes, Prompts(prompts_labelled, prompts_alone), skipped)


def _value(verdict: object) -> float | None:
    """Return a verdict as a number; None for what is none."""
    if isinstance(verdict, str):
        return WORDS.get(verdict.strip().lower())
    if isinstance(verdict, bool) or not isinstance(verdict, int | float):
        return None
    return float(verdict) if 0 <= verdict <= 1 else None


def _surprise(judge: Sequence[float], alone: Sequence[float]) -> float:
    """Return how many standard errors the judge's mean of labelled rows lies above that of the others; 0 without others."""
    everything = [*judge, *alone]
    mean = sum(everything) / len(everything)
    variance = sum((value - mean) ** 2 for value in everything) / len(everything)
    if not alone or variance == 0:
        return 0.0
    error = math.sqrt(variance * (1 / len(judge) + 1 / len(alone)))
    return (sum(judge) / len(judge) - sum(alone) / len(alone)) / error

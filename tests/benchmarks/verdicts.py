"""A causal model's verdicts on labelled pairs: accuracy, and how much of them is the order of the answers.

python tests/benchmarks/verdicts.py FOLDER PAIRS.jsonl.gz --json verdicts.json --pairs 100 --characters 600

FOLDER is a chat model, PAIRS preferences in any format. Of the pairs that have at most so many characters, the first of a seeded
shuffle are asked about. Verdicts are kept beside FILE a few pairs at a time, so a stopped run goes on. `rlhf evaluate MODEL PAIRS
--verdicts FOLDER` does the same beside a reward model.
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

import torch

from rlhf.data.rows import told
from rlhf.data.sources import Source, read_pairs
from rlhf.evaluation.verdicts import compare_pairs, verdict_report
from rlhf.models.text import plain
from rlhf.models.verdicts import Verdicts, load_verdict_model
from rlhf.objectives.verdicts import TwoOrders
from rlhf.pipeline.training import quiet_libraries

TOGETHER = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs_file")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--characters", type=int, default=600)
    options = parser.parse_args()
    quiet_libraries()
    rows, _ = read_pairs(Source(options.pairs_file))
    rows = [r for r in rows if len(plain(r["prompt"]) + told(r, "chosen") + told(r, "rejected")) <= options.characters]
    random.Random(0).shuffle(rows)
    rows = rows[: options.pairs]

    # 1. Verdicts, a few pairs at a time.
    asked: list[list[float]] = json.loads(options.json.read_text())["verdicts"] if options.json.is_file() else []
    model = load_verdict_model(options.model)
    for start in range(len(asked), len(rows), TOGETHER):
        found = compare_pairs(model, rows[start : start + TOGETHER])
        columns = (found.fits.float(), found.orders.log_odds, found.orders.bias, found.share)
        asked += torch.stack(columns, dim=1).tolist()
        write(options.json, {"verdicts": asked})

    # 2. The report, and the same with one order alone.
    fits, log_odds, bias, share = torch.tensor(asked[: len(rows)]).unbind(dim=1)
    verdicts = Verdicts(fits.bool(), TwoOrders(log_odds, bias), share)
    report: dict[str, Any] = {**verdict_report(options.model, verdicts, rows)}
    report["accuracy_one_order"] = [float((x > 0).float().mean()) for x in (log_odds + bias, log_odds - bias)]
    lengths = [len(told(row, "chosen")) - len(told(row, "rejected")) for row in rows]
    report["length_baseline"] = sum((d > 0) + 0.5 * (d == 0) for d in lengths) / len(rows)
    write(options.json, {"report": report, "verdicts": asked})
    print(json.dumps(report, indent=1))


def write(file: Path, values: dict[str, Any]) -> None:
    """Write all at once."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(values))
    os.replace(part, file)


if __name__ == "__main__":
    main()

"""Kill whole runs at random moments, again and again: does the same command end with the same bits?

    python -m tests.faults.storm --kills 60 --work FOLDER --out storm.json [--minutes 9]

The same command goes on from what FOLDER holds, so a long storm may be cut into jobs by `--minutes`; until there were so
many kills it exits with 3. Three things are killed in turn until there were so many kills:

- `separate`: a lab, SFT, a vote, a reward model of two members, PPO with a model for each role, two rounds;
- `shared`: the same with LoRA, the four roles on one backbone;
- `label`: the labelling page while people click; every click that was answered must be in the book.

A life ends by SIGKILL, seldom by SIGTERM or Ctrl-C. One thread; a kill costs about a quarter of a run. `kills` are those
that found the process alive, `completed` the runs that came to their end by the same command, `same_bits` those of them
whose weights have the sha256 of the run that nobody killed, `steps_repeated_max` the most optimizer steps that a stage did
again, and `labels_lost` the clicks that were answered and are not in the book.
"""

import argparse
import json
import math
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import requests

from rlhf.data.labelbook import BOOK, LabelBook
from rlhf.data.labels import Question, question_id
from rlhf.serve.label import annotator_tokens
from tests.command import Process, rlhf

RECIPE = """
name: storm
lab: {demonstrations: 300, pairs: 200, test_pairs: 60, hidden_size: 32, num_hidden_layers: 1}
sft: {learning_rate: 3.0e-3, per_device_train_batch_size: 16, num_train_epochs: 2, logging_steps: 1, save_steps: 4}
vote: {members: 2, folds: 2}
reward: {objective: posterior, members: 2, learning_rate: 1.0e-3, per_device_train_batch_size: 16, num_train_epochs: 2,
         logging_steps: 1, save_steps: 4}
ppo: {total_episodes: 128, per_device_train_batch_size: 8, num_mini_batches: 2, num_ppo_epochs: 2, learning_rate: 1.0e-3,
      max_completion_length: 12, logging_steps: 1, save_steps: 4}
rounds: {count: 2, labels: 30, prompts: 30, responses: 2}
evaluate: {prompts: 24}
"""
LORA = "use_peft: true, lora_r: 4, lora_target_modules: [q_proj, v_proj], "
RECIPES = {
    "separate": RECIPE,
    "shared": RECIPE.replace("posterior, members: 2,", "posterior,")
    .replace("sft: {", f"sft: {{{LORA}")
    .replace("reward: {", f"reward: {{{LORA}")
    .replace("ppo: {", f"ppo: {{{LORA}"),
}
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]
PORT = 18_765
UNFINISHED = 3


def weights(run: Path) -> dict[str, str]:
    """The sha256 of every weight file that the manifests of a finished run name."""
    return {
        f"{manifest.parent.relative_to(run)}/{file['path']}": file["sha256"]
        for manifest in sorted(run.glob("round-*/*/manifest.json"))
        for file in json.loads(manifest.read_text(encoding="utf-8"))["files"]
        if file["path"].endswith(".safetensors")
    }


def steps_repeated(run: Path) -> int:
    """The most steps that a stage did again after it had been stopped, by the rows of its metrics."""
    most = 0
    for file in run.rglob("metrics.jsonl"):
        reached = 0
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "resumed_from" in row:
                most, reached = max(most, reached - row["resumed_from"]), row["resumed_from"]
            reached = max(reached, row.get("step", 0))
    return most


def whole_run(name: str, work: Path) -> tuple[float, dict[str, str]]:
    """The seconds and the weights of a run that nobody kills, made once."""
    noted = work / f"{name}-whole.json"
    if not noted.is_file():
        shutil.rmtree(work / f"{name}-whole", ignore_errors=True)
        (work / f"{name}.yaml").write_text(RECIPES[name], encoding="utf-8")
        begin = time.monotonic()
        result = rlhf("run", f"{name}.yaml", "--out", f"{name}-whole", cwd=work)
        assert result.returncode == 0, result.stderr[-3000:]
        noted.write_text(json.dumps(time.monotonic() - begin), encoding="utf-8")
    seconds: float = json.loads(noted.read_text(encoding="utf-8"))
    return seconds, weights(work / f"{name}-whole")


def storm_over_runs(name: str, kills: int, work: Path, seed: int, end: float) -> dict[str, Any]:
    """Kill runs of a recipe until there were so many kills, or the time is up; each run ends by the same command."""
    noted, out = work / f"{name}.json", work / f"{name}-killed"
    seconds, expected = whole_run(name, work)
    found: dict[str, Any] = {"kills": 0, "completed": 0, "same_bits": 0, "steps_repeated_max": 0, "failures": []}
    if noted.is_file():
        found = json.loads(noted.read_text(encoding="utf-8"))
    while (found["kills"] < kills or out.exists()) and time.monotonic() < end:
        # 1. One life: it ends by itself, or by a signal at a moment that only the seed and the number of kills decide.
        rng = random.Random(f"{seed} {name} {found['kills']} {found['completed']}")
        process = Process(("run", f"{name}.yaml", "--out", out.name), work)
        sent = rng.choice(SIGNALS)
        deadline = time.monotonic() + rng.uniform(0.05, 0.5) * seconds
        while found["kills"] < kills and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        is_alive = found["kills"] < kills and process.poll() is None
        if is_alive:
            process.send_signal(sent)
        result = process.wait(60 * seconds)

        # 2. A run that came to its end is compared with the whole one.
        if is_alive and result.returncode in (-sent, 128 + sent):
            found["kills"] += 1
        elif result.returncode == 0:
            found["completed"] += 1
            found["same_bits"] += weights(out) == expected
            found["steps_repeated_max"] = max(found["steps_repeated_max"], steps_repeated(out))
            shutil.rmtree(out)
        else:
            found["failures"].append(result.stderr[-2000:])
            out.rename(work / f"{name}-failed-{len(found['failures'])}")
        noted.write_text(json.dumps(found), encoding="utf-8")
        print(json.dumps({"storm": name, **found}), flush=True)
    return found


def storm_over_labels(kills: int, work: Path, rng: random.Random) -> dict[str, Any]:
    """Kill the labelling page while somebody clicks, and look for every click that was answered; made once."""
    noted, run = work / "label.json", work / "labels"
    if noted.is_file():
        found: dict[str, Any] = json.loads(noted.read_text(encoding="utf-8"))
        return found
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    (run / "recipe.yaml").write_text("rounds: {annotators_per_pair: 1}\n", encoding="utf-8")
    prompt = [{"role": "user", "content": "Which?"}]
    questions = [Question(question_id(1, prompt, [f"a{i}", "b"]), 1, prompt, f"a{i}", "b") for i in range(2_000)]
    book = LabelBook(run / BOOK)
    book.ask(questions)
    token, url = annotator_tokens(book.path, ["ann"])["ann"], f"http://127.0.0.1:{PORT}/"
    answered: list[str] = []
    killed = 0
    while killed < kills:
        process = Process(("label", "labels", "--annotator", "ann", "--port", str(PORT)), work)
        deadline: float | None = None
        while deadline is None or time.monotonic() < deadline:
            form = {
                "id": questions[len(answered) % len(questions)].id,
                "choice": "left",
                "left_side": "first",
                "token": token,
            }
            try:
                reply = requests.post(url, data=form, timeout=10, allow_redirects=False)
            except requests.ConnectionError:
                assert process.poll() is None, "the page ends by itself"
                time.sleep(0.02)
                continue
            deadline = deadline or time.monotonic() + rng.uniform(0.1, 1.0)
            if reply.status_code == 303:
                answered.append(form["id"])
        process.send_signal(rng.choice(SIGNALS))
        process.wait(60)
        killed += 1
    lost = set(answered) - {verdict.id for verdict in book.verdicts(1)}
    found = {"kills": killed, "completed": killed, "labels": len(answered), "labels_lost": len(lost)}
    noted.write_text(json.dumps(found), encoding="utf-8")
    return found


def main() -> None:
    """Print a row a storm, write all of them, and exit with 1 where something was lost or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    work, each = arguments.work.resolve(), -(-arguments.kills // 3)
    end = time.monotonic() + 60 * arguments.minutes
    storms = {"label": storm_over_labels(arguments.kills - 2 * each, work, random.Random(arguments.seed))}
    storms |= {name: storm_over_runs(name, each, work, arguments.seed, end) for name in RECIPES}
    runs = [storms[name] for name in RECIPES]
    result = {
        "kills": sum(storm["kills"] for storm in storms.values()),
        "completed": sum(storm["completed"] for storm in runs),
        "same_bits": sum(storm["same_bits"] for storm in runs),
        "steps_repeated_max": max(storm["steps_repeated_max"] for storm in runs),
        "labels_lost": storms["label"]["labels_lost"],
        "storms": storms,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    if result["same_bits"] < result["completed"] or result["labels_lost"] or any(storm["failures"] for storm in runs):
        raise SystemExit(1)
    if result["kills"] < arguments.kills or any((work / f"{name}-killed").exists() for name in RECIPES):
        raise SystemExit(UNFINISHED)


if __name__ == "__main__":
    main()

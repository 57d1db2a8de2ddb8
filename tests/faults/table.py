"""What may go wrong, what is right then, and the tests that say so: the table is written from the marks of the tests.

python -m tests.faults.table          # writes tests/faults/README.md
"""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = Path(__file__).parent / "README.md"
MARK = "pytest.mark.fault"
HEAD = """# Faults and attacks

What may go wrong, what is right then, and the tests that say so. A test is marked with the faults that it covers,
`@pytest.mark.fault("…")`; `python -m tests.faults.table` writes this page from the marks, and
`tests/faults/test_table.py` compares the two. Everywhere: one sentence, exit 2 (bad input) or 1 (failed), nothing
created, nothing lost, under a minute, no traceback; a server answers 4xx and stays up.

`python -m tests.faults.storm` is no test: it kills runs at random moments until it has done so often enough. Nor are
`fuzz` and `fuzz_files`, which send requests and damage files at random, and `mutants`, which damages our own code. What
they found: [faults](../../recipes/results/faults.md).

"""
# Group → fault → what is right.
FAULTS: dict[str, dict[str, str]] = {
    "Data, training, serving": {
        "identical pair": "the two answers of a pair are the same: left out and counted, never trained on",
        "common layouts": "read as what they are, whoever wrote the file; what can't be read is left out and counted",
        "direction of labels": "the answer that is more likely the better one is the chosen one, everywhere",
        "labels of several people": "each counts, under a name or none, in words or numbers",
        "empty or missing text": "empty, blank or no text, a missing column, another type: counted with row numbers",
        "margin out of range": "NaN, infinite, absurd or missing in some rows: refused or left out before training",
        "duplicates and leakage": "repeats are counted, a prompt on both sides is refused, a conversation stays whole",
        "rows too long": "left out or cut, counted and said",
        "padding is the end": "another padding token, or a refusal; scores depend on neither padding nor neighbours",
        "chat template": "none, one with today's date, one that drops or refuses turns: frozen or refused by name",
        "cut or ended answer": "they score differently; the penalty for a missing end falls exactly there",
        "adapter of another base": "refused by the base's fingerprint, whatever its shape",
        "adapter read back": "the same scores in a fresh process; without a trained head, or with two labels: refused",
        "another tokenizer": "text crosses from the policy to the reward model, not ids",
        "one score everywhere": "exported, merged or served, a text has the same raw score",
        "kill at any moment": "the same command ends with the same bits",
        "damaged checkpoint": "the newest whole one is taken, and the others are named",
        "refused after hours": "what a later stage would refuse of the recipe's own keys is said before the first",
        "streams that are closed or full": "the command does its work; or one sentence, and no traceback",
        "result files that are something else": "refused before any work: no people's labels are overwritten",
        "full disk": "one sentence, the old checkpoint stays whole, the same command goes on",
        "signals": "a checkpoint is saved; exit 143 or 130, and the same command goes on",
        "not finite": "a loss, gradient or reward that is no number stops before the update; the batch is saved",
        "a process fails": "the others do not wait for it for ever",
        "mistakes in a recipe": "all at once with their lines, a suggestion, exit 2, nothing created",
        "a run that changed": "other settings, data or files than those it was begun with: refused by name",
        "folder in use": "in use, foreign, no folder at all, not writable: refused, nothing overwritten",
        "reward server fails": "asked again a few times, then the run stops before the update with its state saved",
        "requests without sense": "4xx with a sentence; answers in the order of the request",
        "gold questions": "ties, pairs that are asked about anyway, no usable pair, a share out of range: a sentence",
        "labels of a round": "unknown, repeated, contradicting or missing labels: counted and put aside",
        "edges of PPO": "empty answers, a constant reward, all cut, a KL over its limit: no division by zero, said",
    },
    "Attacks on the labelling page": {
        "two people in one browser": "each click counts for the person and the side that its page showed",
        "a form of another page": "a page on another port can't label",
        "odd tokens and bodies": "4xx, whatever bytes they hold",
        "a huge form": "read no further than a form can be long",
        "labels locked": "503 with a sentence; other requests do not wait",
        "hostile label files": "a row that can't be used is put aside with its reason, the others are taken",
        "markup in texts": "shown as text, never run",
    },
    "Attacks by model folders": {
        "damage that no probe reads": "the card's digests name the file, whatever verb opens the model",
        "code in a folder": "never run, whatever standard input says",
        "weights not whole": "missing tensors, or those of another architecture, are named; nothing starts random",
        "any folder, any verb": "refused alike by `run`, `score`, `evaluate`, `export`, `certify`, `serve`",
        "weights no numbers": "NaN and infinite weights are named by their tensor",
        "template without end": "stopped after ten seconds, or when it asks for hundreds of megabytes",
        "sandbox and pickles": "a template that leaves jinja's sandbox, pickled weights: refused by name",
        "relative and home folders": "found from any working directory",
    },
    "Attacks by recipes and functions": {
        "numbers out of range": "each number of a recipe has its range; `check` refuses what `run` refuses",
        "YAML that is none": "merge keys, tags, depth, odd characters, numbers of a thousand digits: a line and a sentence",
        "bombs and tags": "refused by name in a fraction of a second",
        "functions that end the process": "no exit code 0, and the key is named",
        "functions that fail": "at import: before anything is made; later: one sentence with the key; none runs for ever",
        "functions that draw": "the run's random numbers are those that would have come",
        "functions that change lists": "they get copies",
        "servers without sense": "what is no number is no reward, and is said with what the server answered",
        "passwords in addresses": "hidden wherever an address is written, and named by an environment variable",
        "secrets in the environment": "in no file and no line of output",
    },
    "Runs that move and age": {
        "checkpoint zeroed": "the older whole one is taken",
        "weights replaced": "a finished stage's files are compared before they are used",
        "function or model changed": "refused between two attempts, by name",
        "records cut or edited": "one sentence that says what to delete",
        "run moved": "copied, moved or linked, it is whole, adapters and their base too; moved under a run at work: said",
        "another user": "weights can be read by whoever may read any new file; one that this user may not read is named",
        "stage deleted": "made again, with the same bits",
        "read-only run": "what reads it works; what would write there names the file",
        "other versions": "those that made a stage and those installed: said once, with what to do for the same bits",
        "clock jumps": "times of files and clocks decide nothing",
    },
    "Memory and disk": {
        "out of memory": "one sentence: the stage, the batch, the keys to change; and what was done is kept",
        "disk that nobody needs": "`rlhf clean` shows and frees it; resume, report, serve and lineage work as before",
    },
    "Attacks on the reward server": {
        "NaN in a body": "422, and the reply is JSON",
        "slow bodies": "cut after the time limit",
        "long queues": "a small request passes a large one; a full queue says so",
        "garbage and load": "4xx, every request answered in its order",
    },
}


def marked_tests() -> Iterator[tuple[str, str]]:
    """Yield each fault that a test is marked with, and the test, `file::function`; read from the source, nothing is imported."""
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == MARK:
                    name = f"{file.relative_to(TESTS)}::{node.name}"  # type: ignore[union-attr]
                    yield from ((argument.value, name) for argument in mark.args if isinstance(argument, ast.Constant))


def fault_page() -> str:
    """Return the page: a table for each group."""
    tests: dict[str, list[str]] = {}
    for fault, name in marked_tests():
        tests.setdefault(fault, []).append(name)
    parts = [HEAD]
    for group, faults in FAULTS.items():
        parts.append(f"## {group}\n\n| fault | what is right, and its tests |\n|---|---|\n")
        for fault, right in faults.items():
            parts.append(f"| **{fault}** | {right} |\n")
            parts += [f"| | `{name}` |\n" for name in tests.get(fault, [])]
        parts.append("\n")
    return "".join(parts).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(fault_page(), encoding="utf-8")

"""What `rlhf label` does around the page: which round is asked about, files out, files in, how far people are."""

import getpass
import itertools
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast, get_args

import yaml

from rlhf.data.controls import Control, gold_questions
from rlhf.data.direction import example
from rlhf.data.label_files import LONGEST_NAME, UNNAMED, Format, export_questions, read_verdicts
from rlhf.data.labelbook import BOOK, LOOKS, LabelBook
from rlhf.data.labels import Question, Verdict, agreement, tally
from rlhf.data.read import ReadReport
from rlhf.data.sources import read_pairs
from rlhf.errors import UserError
from rlhf.files import write_jsonl
from rlhf.report.annotators import annotator_sentences, control_sentences
from rlhf.report.records import MANIFEST
from rlhf.report.result_file import check_result_file

OTHER_UNNAMED = "without a name beside another one that is in the book (fill in `annotator`)"
MOST_REPEATED = 0.5  # more would tell nothing more, and everybody would see it


def open_book(run: Path) -> tuple[LabelBook, int, int]:
    """Open the book of a run, of its second looks or of an audit.

    Returns:
        the book, which round is asked about, and how many verdicts each question should have.

    Raises:
        UserError: the folder is neither, or has no questions (yet).
    """
    is_audit = (run / "audit.json").is_file()
    is_run = (run / "recipe.yaml").is_file()
    is_look = not is_run and (run / BOOK).is_file() and (run.parent / "recipe.yaml").is_file()  # of a run's experts
    if not is_audit and not is_look and not is_run:
        raise UserError(f"{run}: no recipe.yaml; this folder holds no run, and no audit either.")
    try:
        book = LabelBook(run / BOOK) if (run / BOOK).is_file() else None
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise  # locked, or a disk that is full
        raise UserError(f"{run / BOOK}: is no book of labels ({error}); put it back from a copy.") from None
    if is_audit and book is None:
        raise UserError(f"{run}: no questions yet; `rlhf audit … --out {run} --budget N` asks about N of its pairs.")
    if book is None or not book.rounds():
        raise UserError(
            f"{run}: no questions yet; `rlhf run` asks them where the recipe says `rounds: {{labels_from: people}}`."
        )
    if is_audit or is_look:
        return book, book.rounds()[-1], 1
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        return book, book.rounds()[-1], int(recipe["rounds"]["annotators_per_pair"])
    except (ValueError, KeyError, TypeError, yaml.YAMLError):
        raise UserError(
            f"{run / 'recipe.yaml'}: cut off or damaged; the same `rlhf run` says what to do about it."
        ) from None


def hide_gold(run: Path, file: Path) -> list[str]:
    """Add a file's pairs to the questions as hidden gold ones, the chosen answer the right one, and say how many they are.

    Raises:
        UserError: as `open_book`; no usable pair in the file, a tie, or only pairs that are asked about anyway.
    """
    book, number, _ = open_book(run)
    rows, report = read_pairs(str(file))
    gold = gold_questions(rows, book.questions(number), number)
    book.hide_gold(gold)
    lines = [f"{file}: {len(gold)} gold questions are hidden among those of round {number}."]
    if len(gold) < len(rows):
        lines.append(f"{len(rows) - len(gold)} of its pairs are left out, as this round asks about them anyway.")
    return [*lines, *report.sentences()]


def export_to(run: Path, file: Path, form: str) -> int:
    """Write the questions that still want a verdict, gold ones among them, and return how many they are.

    Raises:
        UserError: as `open_book`; no such form; the file is there already, or can't be written.
    """
    check_export(file, form)
    book, number, wanted = open_book(run)
    verdicts = Counter(verdict.id for verdict in book.verdicts(number) if verdict.label != "skip")
    left = [question for question in book.questions(number) if verdicts[question.id] < wanted]
    gold = [one.question for one in book.gold(number)] if left else []
    # By their names, which are drawn, so that nobody sees by its place which question is a gold one.
    rows = export_questions(sorted([*left, *gold], key=lambda q: q.id) if gold else left, cast(Format, form))
    try:
        if form == "plain":
            write_jsonl(file, rows)
        else:
            file.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--export {file}: can't be written ({error.strerror}).") from error
    return len(rows)


def check_export(file: Path, form: str) -> None:
    """Refuse an export that would be written over a file, whose labels may be people's work; or a form that is none.

    Raises:
        UserError: saying so.
    """
    if form not in get_args(Format):
        raise UserError(f"--form {form}: choose {', '.join(get_args(Format))}.")
    check_result_file(file, "--export")


def import_from(run: Path, file: Path, *, say: Callable[[str], None] | None = None) -> dict[str, int]:
    """Take a file's verdicts into the book; those that can't count are written beside it.

    Args:
        say: told what the numbers of the file mean, and which of its lines can't be read.

    Returns:
        how many were `taken`, how many of these are on gold questions, how many replace an earlier verdict of the same
        annotator, and how many were not taken, by reason.

    Raises:
        UserError: no such file, or nothing in it.
    """
    book, number, _ = open_book(run)
    report = ReadReport(str(file))
    questions = book.questions(number)
    gold = {one.question.id: one.question for one in book.gold(number)}
    asked = {question.id: question for question in questions} | gold
    verdicts, refused = read_verdicts(str(file), report, asked)
    if verdicts and not any(verdict.id in asked for verdict in verdicts):
        raise UserError(
            f"{file}: none of its {len(verdicts)} verdicts is on one of the {len(asked)} pairs asked about; another folder's?"
        )
    if say is not None:
        for sentence in (*_reading(report, verdicts, asked), *_read_before(run, number)):
            say(f"{file}: {sentence}")
    earlier = {(verdict.id, verdict.annotator): verdict.label for verdict in book.verdicts(number, with_gold=True)}
    behind = [v for v in verdicts if v.label == "skip" and earlier.get((v.id, v.annotator), "skip") != "skip"]
    verdicts = [verdict for verdict in verdicts if verdict not in behind]
    others = [
        v for v in verdicts if v.annotator == UNNAMED and earlier.get((v.id, UNNAMED), "skip") not in ("skip", v.label)
    ]
    verdicts = [verdict for verdict in verdicts if verdict not in others]
    refused += [{"id": v.id, "label": v.label, "reason": OTHER_UNNAMED} for v in others]
    book.record([verdict for verdict in verdicts if verdict.id in asked and verdict.id not in gold])
    for verdict in (verdict for verdict in verdicts if verdict.id in gold):
        book.record_control(Control(gold[verdict.id], verdict.id), verdict)
    quarantine = [*refused, *tally([*questions, *gold.values()], verdicts).quarantine]
    if quarantine:
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in quarantine)
        # Half a character, which JSON may hold, is written as JSON escapes it.
        content = "".join(lines).encode("utf-8", "backslashreplace")
        place = _free_or_same(run / f"quarantine-{file.stem}.jsonl", content)
        place.write_bytes(content)
        if say is not None:
            say(f"{place}: {len(quarantine)} verdicts that don't count, each with why.")
    counts = {"taken": sum(verdict.id in asked for verdict in verdicts)}
    if gold:
        counts["of them on gold questions"] = sum(verdict.id in gold for verdict in verdicts)
    if again := sum((verdict.id, verdict.annotator) in earlier for verdict in verdicts):
        counts["of them in place of an earlier verdict of the same annotator"] = again
    if behind:
        counts["skips beside an earlier verdict of the same annotator, which stays"] = len(behind)
    for row in quarantine:
        counts[row["reason"]] = counts.get(row["reason"], 0) + 1
    return counts


def _read_before(run: Path, number: int) -> Iterator[str]:
    """Say that the run has read a round's verdicts already, so that later ones change nothing."""
    of_run, of_looks = run / f"round-{number}" / "label", run.parent / f"round-{number}" / "second_look"
    is_run, is_looks = (run / "recipe.yaml").is_file(), run.name == LOOKS and (run.parent / "recipe.yaml").is_file()
    for folder, is_of_it in ((of_run, is_run), (of_looks, is_looks and not is_run)):
        if is_of_it and (folder / MANIFEST).is_file():
            yield (
                f"the run has read the verdicts of round {number}, and later ones change nothing. For them to count, delete "
                f"{folder} and the folders of later stages; then run the same command again."
            )


def _free_or_same(file: Path, content: bytes) -> Path:
    """Return the file, or, where it holds something else, the first of FILE-2, FILE-3, … that doesn't."""
    places = (file if number == 1 else file.with_stem(f"{file.stem}-{number}") for number in itertools.count(1))
    return next(place for place in places if not place.exists() or place.read_bytes() == content)


def _reading(report: ReadReport, verdicts: Sequence[Verdict], asked: Mapping[str, Question]) -> Iterator[str]:
    """Say what a file's numbers mean, with the first decided pair as an example, and which lines can't be read."""
    decided = (v for v in verdicts if v.id in asked and v.label in ("first", "second"))
    first = next(decided, None)
    for sentence in report.directions.values():
        if first is None:
            yield f"{sentence}."
        else:
            question = asked[first.id]
            yield example(sentence, question.first if first.label == "first" else question.second)
    for remark, count in report.noted.items():
        yield f"{count} rows: {remark} (row {', '.join(map(str, report.examples[remark]))})."
    for reason, count in report.dropped.items():
        yield f"{count} lines left out: {reason} (line {', '.join(map(str, report.examples[reason]))})."


def progress_lines(run: Path) -> Sequence[str]:
    """Say in sentences how far people are, and how well they agree."""
    book, number, wanted = open_book(run)
    done, total, given_up = book.progress(number, wanted=wanted)
    verdicts = book.verdicts(number)
    lines = [
        f"round {number}: {done - given_up} of {total} pairs have the {wanted} verdict{'s' * (wanted > 1)} asked for."
    ]
    if given_up:
        lines.append(f"{given_up} more lack some: somebody skipped them, and all who label much have seen them.")
    lines += [
        f"{count} that others skipped wait for {name}; if {name} is gone, skip them on that page too."
        for name, count in book.waits_for(number, wanted=wanted).items()
    ]
    lines += _read_before(run, number)
    agreed = agreement(verdicts)
    for name, count in agreed["annotators"].items():
        times = sorted(v.seconds for v in verdicts if v.annotator == name and v.seconds is not None)
        lines.append(f"{name}: {count}" + (f", {times[len(times) // 2]:.0f} s each (median)." if times else "."))
    for pair in agreed["pairs"]:
        kappa = "-" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        lines.append(
            f"{' and '.join(pair['annotators'])}: {pair['agree']:.0%} alike on {pair['questions']}, kappa {kappa}."
        )
    return [*lines, *_reliability(book, number)]


def _reliability(book: LabelBook, number: int) -> Iterator[str]:
    """Say how reliable each annotator is, as far as control questions and those that several answered tell, and what is odd."""
    from rlhf.reward.annotators import report_verdicts
    from rlhf.reward.controls import report_gold, report_repeats

    verdicts, gold = book.verdicts(number, with_gold=True), {one.question.id: one.label for one in book.gold(number)}
    questions = [*book.questions(number), *(one.question for one in book.gold(number))]
    yield from control_sentences(report_gold(verdicts, gold), report_repeats(book.repeats(number)))
    report = report_verdicts(verdicts, right=gold, questions=questions)
    yardstick = "by gold questions and the others' verdicts" if gold else "by the others' verdicts on the same pairs"
    for name, entry in report.items():
        if entry["accuracy"] is not None and entry["accuracy_ci"] is not None:
            low, high = entry["accuracy_ci"]
            yield f"{name}: accuracy {entry['accuracy']:.2f} [{low:.2f}, {high:.2f}], {yardstick}."
    yield from annotator_sentences(report, has_gold=bool(gold))


def serve_page(
    run: Path, names: list[str] | None, *, repeat: float, host: str, port: int, say: Callable[[str], None]
) -> None:
    """Serve the labelling page until somebody ends it; every annotator gets a link of their own.

    Args:
        repeat: of the questions that somebody answers, the share that is asked again, in [0, 0.5].
        say: shows people their links, tokens and all.

    Raises:
        UserError: as `open_book`; another share; a name that is none; the server is not installed; the address is taken.
    """
    if not 0 <= repeat <= MOST_REPEATED:
        raise UserError(
            f"--repeat {repeat:g}: must lie between 0 and {MOST_REPEATED}; 0.1 asks every tenth question again."
        )
    book, number, wanted = open_book(run)
    for sentence in _read_before(run, number):
        say(sentence)
    try:
        import uvicorn
    except ImportError as error:
        raise UserError("rlhf label: install the server first (pip install '.[serve]').") from error
    from rlhf.serve.label import annotator_tokens, label_app
    from rlhf.serve.run import bind

    names = list(dict.fromkeys(names or [getpass.getuser()]))
    if odd := [name for name in names if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME]:
        raise UserError(f"--annotator {odd[0][:40]!r}: give a name in one line, of 1 to {LONGEST_NAME} letters.")
    listening = bind(host, port)
    tokens = annotator_tokens(book.path, names)
    for name in names:
        say(f"{name}: http://{host}:{listening.getsockname()[1]}/?token={tokens[name]}")
    app = label_app(book, number, tokens, wanted=wanted, title=f"{run.name}, round {number}", repeat=repeat)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])

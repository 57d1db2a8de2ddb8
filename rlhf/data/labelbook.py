"""The book of people's verdicts: one sqlite file a run, written by the labelling page and by imports, read by the run."""

import hashlib
import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rlhf.data.controls import Control, Gold, History, Repeat
from rlhf.data.labels import Question, Verdict

BOOK = "labels.sqlite"
LOOKS = "second_look"  # in the run: the folder of the experts' book, apart from that of the annotators
SECONDS_TO_WAIT = 10.0  # for another program that writes
SCHEMA = """
CREATE TABLE IF NOT EXISTS questions (
    id TEXT PRIMARY KEY, round INTEGER NOT NULL, position INTEGER NOT NULL, row TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS verdicts (
    id TEXT NOT NULL, annotator TEXT NOT NULL, label TEXT NOT NULL, seconds REAL, at REAL NOT NULL,
    PRIMARY KEY (id, annotator));
CREATE TABLE IF NOT EXISTS gold (
    id TEXT PRIMARY KEY, round INTEGER NOT NULL, position INTEGER NOT NULL, row TEXT NOT NULL, label TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS control_verdicts (
    id TEXT NOT NULL, annotator TEXT NOT NULL, label TEXT NOT NULL, seconds REAL, at REAL NOT NULL, of TEXT NOT NULL,
    PRIMARY KEY (id, annotator));
"""


class Progress(NamedTuple):
    """How many of a round's questions are done, how many there are, and how many of those done lack verdicts, as people skipped."""

    done: int
    total: int
    given_up: int


class LabelBook:
    """Questions by round, and every annotator's verdicts on them. Each method is one transaction; several processes may write.

    Verdicts on control questions (`rlhf.data.controls`) are kept apart: `verdicts` has none of them, so nothing trains on them.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._open() as connection:
            connection.executescript(SCHEMA)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=SECONDS_TO_WAIT)
        try:
            with connection:
                yield connection
        finally:
            connection.close()

    def ask(self, questions: Sequence[Question]) -> list[Question]:
        """Add a round's questions; those that are in the book stay in their order, in which they are returned."""
        rows = [
            (q.id, q.round, position, json.dumps(q.as_row(), ensure_ascii=False))
            for position, q in enumerate(questions)
        ]
        with self._open() as connection:
            connection.executemany("INSERT OR IGNORE INTO questions VALUES (?, ?, ?, ?)", rows)
            connection.executemany("UPDATE questions SET round = ABS(round) WHERE id = ?", [(q.id,) for q in questions])
        there = {one.id: one for number in {q.round for q in questions} for one in self.questions(number)}
        return [question.as_shown(first=there[question.id].first) for question in questions]

    def withdraw_others(self, round_number: int, asked: Iterable[str]) -> int:
        """Take back the questions of a round that are none of these, and return how many they were.

        They are of a policy that was trained anew since. Verdicts on them stay in the book, and count nowhere.
        """
        old = [(question.id,) for question in self.questions(round_number) if question.id not in set(asked)]
        with self._open() as connection:
            # Under a negative round: asked again, each has the order that verdicts on it mean.
            connection.executemany("UPDATE questions SET round = -ABS(round) WHERE id = ?", old)
        return len(old)

    def withdraw_later(self, round_number: int) -> int:
        """Take back the questions of later rounds, and return how many they were: a round that asks again makes those anew.

        The newest round of a book is the one that people answer.
        """
        with self._open() as connection:
            return connection.execute("UPDATE questions SET round = -round WHERE round > ?", (round_number,)).rowcount

    def rounds(self) -> list[int]:
        """Return the numbers of the rounds with questions, oldest first."""
        with self._open() as connection:
            return [
                row[0]
                for row in connection.execute("SELECT DISTINCT round FROM questions WHERE round > 0 ORDER BY round")
            ]

    def questions(self, round_number: int) -> list[Question]:
        """Return a round's questions in their order."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT row FROM questions WHERE round = ? ORDER BY position", (round_number,)
            ).fetchall()
        return [Question(**json.loads(row[0])) for row in rows]

    def verdicts(self, round_number: int | None = None, *, with_gold: bool = False) -> list[Verdict]:
        """Return all verdicts, or those on one round's questions, oldest first.

        Args:
            with_gold: also those on gold questions, which are no labels to train on.
        """
        columns = "SELECT id, label, annotator, seconds, at FROM"
        query = f"{columns} verdicts" + (f" UNION ALL {columns} control_verdicts WHERE id = of" if with_gold else "")
        asked = "SELECT id FROM questions WHERE round = :round UNION SELECT id FROM gold WHERE round = :round"
        where = "" if round_number is None else f" WHERE id IN ({asked})"
        with self._open() as connection:
            rows = connection.execute(f"SELECT * FROM ({query}){where} ORDER BY at", {"round": round_number})
            return [Verdict(*row[:4]) for row in rows]

    def record(self, verdicts: Sequence[Verdict]) -> None:
        """Record verdicts; an annotator's later verdict on a question replaces the earlier one."""
        with self._open() as connection:
            now = {name: _time_of(connection, name) for name in {verdict.annotator for verdict in verdicts}}
            rows = [(v.id, v.annotator, v.label, v.seconds, now[v.annotator]) for v in verdicts]
            connection.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?)", rows)

    def undo(self, annotator: str, round_number: int) -> str | None:
        """Delete an annotator's latest verdict of a round; return the question's id, or None if there was no verdict."""
        with self._open() as connection:
            row = connection.execute(
                "SELECT v.id, v.at FROM verdicts v JOIN questions q ON q.id = v.id "
                "WHERE v.annotator = :annotator AND q.round = :round UNION ALL "
                "SELECT c.id, c.at FROM control_verdicts c "
                "LEFT JOIN questions q ON q.id = c.of LEFT JOIN gold g ON g.id = c.of "
                "WHERE c.annotator = :annotator AND COALESCE(q.round, g.round) = :round ORDER BY 2 DESC LIMIT 1",
                {"annotator": annotator, "round": round_number},
            ).fetchone()
            if row is not None:
                for table in ("verdicts", "control_verdicts"):  # no id is in both
                    connection.execute(f"DELETE FROM {table} WHERE id = ? AND annotator = ?", (row[0], annotator))
        return None if row is None else str(row[0])

    def next_for(self, annotator: str, round_number: int, *, wanted: int) -> Question | None:
        """Return the next question that this annotator has not answered and that has fewer than `wanted` verdicts; a skip is none.

        Everybody has an order of their own, drawn by their name, so that people who work at once seldom get the same question.
        """
        with self._open() as connection:
            names = connection.execute(
                "SELECT q.id FROM questions q WHERE q.round = ? "
                "AND NOT EXISTS (SELECT 1 FROM verdicts v WHERE v.id = q.id AND v.annotator = ?) "
                "AND (SELECT COUNT(*) FROM verdicts v WHERE v.id = q.id AND v.label != 'skip') < ?",
                (round_number, annotator, wanted),
            ).fetchall()
            if not names:
                return None
            name = min(names, key=lambda one: hashlib.sha256(f"{annotator}\x1f{one[0]}\x1forder".encode()).digest())
            row = connection.execute("SELECT row FROM questions WHERE id = ?", name).fetchone()
        return Question(**json.loads(row[0]))

    def progress(self, round_number: int, *, wanted: int) -> Progress:
        """Return how far a round's questions are.

        A question is done when it has as many verdicts as are wanted, skips left out; or when some skipped it, so many in all have
        seen it, and so have all who have answered more than half as many as who answered most.
        """
        seen_by, decided, regulars = self._seen(round_number)
        whole = sum(decided[name] >= wanted for name in seen_by)
        given_up = sum(decided[name] < wanted <= len(people) and regulars <= people for name, people in seen_by.items())
        return Progress(whole + given_up, len(seen_by), given_up)

    def waits_for(self, round_number: int, *, wanted: int) -> dict[str, int]:
        """Return who has to see how many questions of a round that others skipped, before these are given up."""
        seen_by, decided, regulars = self._seen(round_number)
        skipped = [people for name, people in seen_by.items() if decided[name] < wanted <= len(people)]
        return dict(Counter(name for people in skipped for name in sorted(regulars - people)))

    def _seen(self, round_number: int) -> tuple[dict[str, set[str]], Counter[str], set[str]]:
        """Return who saw each question of a round, how many verdicts it has, and who has answered much of the round."""
        seen_by: dict[str, set[str]] = {question.id: set() for question in self.questions(round_number)}
        decided: Counter[str] = Counter()
        for verdict in self.verdicts(round_number):
            seen_by[verdict.id].add(verdict.annotator)
            decided[verdict.id] += verdict.label != "skip"
        answered = Counter(name for people in seen_by.values() for name in people)
        most = max(answered.values(), default=0)
        return seen_by, decided, {name for name, count in answered.items() if 2 * count > most}

    def hide_gold(self, gold: Sequence[Gold]) -> None:
        """Add gold questions to a round; of those that are in the book the right answer is this one from now on."""
        rows = [
            (g.question.id, g.question.round, position, json.dumps(g.question.as_row(), ensure_ascii=False), g.label)
            for position, g in enumerate(gold)
        ]
        with self._open() as connection:
            connection.executemany(
                "INSERT INTO gold VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET label = excluded.label", rows
            )

    def gold(self, round_number: int) -> list[Gold]:
        """Return a round's gold questions in the order of their file."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT row, label FROM gold WHERE round = ? ORDER BY position", (round_number,)
            ).fetchall()
        return [Gold(Question(**json.loads(row)), label) for row, label in rows]

    def record_control(self, control: Control, verdict: Verdict) -> None:
        """Record a verdict on a control question; a later one replaces the earlier one."""
        with self._open() as connection:
            now = _time_of(connection, verdict.annotator)
            row = (verdict.id, verdict.annotator, verdict.label, verdict.seconds, now, control.of)
            connection.execute("INSERT OR REPLACE INTO control_verdicts VALUES (?, ?, ?, ?, ?, ?)", row)

    def repeats(self, round_number: int) -> list[Repeat]:
        """Return what people said twice of a round's questions, oldest first."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT v.annotator, v.label, c.label FROM control_verdicts c "
                "JOIN verdicts v ON v.id = c.of AND v.annotator = c.annotator "
                "JOIN questions q ON q.id = c.of WHERE q.round = ? ORDER BY c.at",
                (round_number,),
            ).fetchall()
        return [Repeat(*row) for row in rows]

    def history(self, annotator: str, round_number: int) -> History:
        """Return what one person has answered in a round."""
        verdicts = [verdict for verdict in self.verdicts(round_number) if verdict.annotator == annotator]
        with self._open() as connection:
            controls: dict[str, str] = dict(
                connection.execute("SELECT id, of FROM control_verdicts WHERE annotator = ? ORDER BY at", (annotator,))
            )
        gold = {one.question.id for one in self.gold(round_number)}
        ordinary = {question.id for question in self.questions(round_number)}
        return History(
            verdicts,
            [name for name in controls if name in gold],
            [of for name, of in controls.items() if name != of and of in ordinary],
        )


def _time_of(connection: sqlite3.Connection, annotator: str) -> float:
    """Return the time of an annotator's next verdict: now, and later than the others, whatever a clock does that is set back."""
    of_both = "SELECT annotator, at FROM verdicts UNION ALL SELECT annotator, at FROM control_verdicts"
    (latest,) = connection.execute(f"SELECT MAX(at) FROM ({of_both}) WHERE annotator = ?", (annotator,)).fetchone()
    return max(time.time(), (latest or 0.0) + 1e-3)

"""The book of people's verdicts: one sqlite file a run, written by the labelling page and by imports, read by the run."""

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf.data.labels import Question, Verdict

BOOK = "labels.sqlite"
SECONDS_TO_WAIT = 10.0  # for another program that writes
SCHEMA = """
CREATE TABLE IF NOT EXISTS questions (
    id TEXT PRIMARY KEY, round INTEGER NOT NULL, position INTEGER NOT NULL, row TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS verdicts (
    id TEXT NOT NULL, annotator TEXT NOT NULL, label TEXT NOT NULL, seconds REAL, at REAL NOT NULL,
    PRIMARY KEY (id, annotator));
"""


class LabelBook:
    """Questions by round, and every annotator's verdicts on them. Each method is one transaction; several processes may write."""

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

    def ask(self, questions: Sequence[Question]) -> None:
        """Add a round's questions; those that are in the book stay as they are."""
        rows = [
            (q.id, q.round, position, json.dumps(q.as_row(), ensure_ascii=False))
            for position, q in enumerate(questions)
        ]
        with self._open() as connection:
            connection.executemany("INSERT OR IGNORE INTO questions VALUES (?, ?, ?, ?)", rows)

    def rounds(self) -> list[int]:
        """Return the numbers of the rounds with questions, oldest first."""
        with self._open() as connection:
            return [row[0] for row in connection.execute("SELECT DISTINCT round FROM questions ORDER BY round")]

    def questions(self, round_number: int) -> list[Question]:
        """Return a round's questions in their order."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT row FROM questions WHERE round = ? ORDER BY position", (round_number,)
            ).fetchall()
        return [Question(**json.loads(row[0])) for row in rows]

    def verdicts(self, round_number: int | None = None) -> list[Verdict]:
        """Return all verdicts, or those on one round's questions, oldest first."""
        query = "SELECT v.id, v.label, v.annotator, v.seconds FROM verdicts v"
        values: tuple[int, ...] = ()
        if round_number is not None:
            query, values = f"{query} JOIN questions q ON q.id = v.id WHERE q.round = ?", (round_number,)
        with self._open() as connection:
            return [Verdict(*row) for row in connection.execute(f"{query} ORDER BY v.at", values)]

    def record(self, verdicts: Sequence[Verdict]) -> None:
        """Record verdicts; an annotator's later verdict on a question replaces the earlier one."""
        rows = [(v.id, v.annotator, v.label, v.seconds, time.time()) for v in verdicts]
        with self._open() as connection:
            connection.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?)", rows)

    def undo(self, annotator: str, round_number: int) -> str | None:
        """Delete an annotator's latest verdict of a round; return the question's id, or None if there was no verdict."""
        with self._open() as connection:
            row = connection.execute(
                "SELECT v.id FROM verdicts v JOIN questions q ON q.id = v.id WHERE v.annotator = ? AND q.round = ? "
                "ORDER BY v.at DESC LIMIT 1",
                (annotator, round_number),
            ).fetchone()
            if row is not None:
                connection.execute("DELETE FROM verdicts WHERE id = ? AND annotator = ?", (row[0], annotator))
        return None if row is None else str(row[0])

    def next_for(self, annotator: str, round_number: int, *, wanted: int) -> Question | None:
        """Return the next question that this annotator has not answered and that has fewer than `wanted` verdicts."""
        with self._open() as connection:
            row = connection.execute(
                "SELECT q.row FROM questions q WHERE q.round = ? "
                "AND NOT EXISTS (SELECT 1 FROM verdicts v WHERE v.id = q.id AND v.annotator = ?) "
                "AND (SELECT COUNT(*) FROM verdicts v WHERE v.id = q.id) < ? ORDER BY q.position LIMIT 1",
                (round_number, annotator, wanted),
            ).fetchone()
        return None if row is None else Question(**json.loads(row[0]))

    def progress(self, round_number: int, *, wanted: int) -> tuple[int, int]:
        """Return how many of a round's questions have as many verdicts as are wanted, and how many questions there are."""
        with self._open() as connection:
            done = connection.execute(
                "SELECT COUNT(*) FROM questions q WHERE q.round = ? "
                "AND (SELECT COUNT(*) FROM verdicts v WHERE v.id = q.id) >= ?",
                (round_number, wanted),
            ).fetchone()[0]
            total = connection.execute("SELECT COUNT(*) FROM questions WHERE round = ?", (round_number,)).fetchone()[0]
        return int(done), int(total)

"""The one thread that owns a model: it takes what waits, sorts it by length, and scores it within a budget of tokens."""

import heapq
import logging
import math
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from rlhf.serve.metrics import Metrics
from rlhf.serve.models import Encoded, ServedModel, Text

log = logging.getLogger("rlhf.serve")
AHEAD = 4  # batches that are encoded before they are scored, so that there are similar lengths to choose from
PADDING = 0.25  # largest share of padding in a batch …
FREE_PADDING = 256  # … of more padding tokens than these, which cost less than a forward of their own
LONGEST_PAUSE = 60


class Refused(Exception):
    """A request that is answered with an error: its HTTP status, a sentence, and after how many seconds to try again."""

    def __init__(self, status: int, sentence: str, *, retry_after: int | None = None):
        self.status, self.sentence, self.retry_after = status, sentence, retry_after
        super().__init__(sentence)


class Scored(NamedTuple):
    """The answer to a job: scores in the order of its texts, how many tokens were read, how many texts were cut."""

    scores: list[float]
    tokens: int
    cut: int


@dataclass
class Job:
    """The texts of one request on their way through a model.

    Attributes:
        start: the turn of its first text; text i has turn `start + i`.
        left: texts without a score; 0 too for a job that was given up.
        done: the answer, or why there is none.
    """

    texts: Sequence[Text]
    start: int = 0
    left: int = 0
    tokens: int = 0
    cut: int = 0
    arrived: float = field(default_factory=time.monotonic)
    scores: list[float] = field(default_factory=list)
    done: "Future[Scored]" = field(default_factory=Future)


class _Place(NamedTuple):
    """A text's place in the queue: its turn, the number of its job, the job and the text's row in it."""

    turn: int
    number: int
    job: Job
    row: int


class _Ready(NamedTuple):
    """A text that is encoded."""

    place: _Place
    encoded: Encoded


class Worker:
    """A thread that alone touches its model's tokenizer and network.

    The queue is fair: text i of a job has the turn at which the job came, plus i, and the lowest turn is served first.
    So a request of 20,000 texts is cut into batches, and one that comes later waits for the batch in hand, not for all.

    Args:
        model: what it scores with.
        metrics: where batches and the queue are counted.
        batch_tokens: largest size of a forward, padding included; a text alone may be longer.
        batch_texts: most texts in a forward.
        most_waiting: texts in the queue, beyond which requests are refused.
    """

    def __init__(self, model: ServedModel, metrics: Metrics, *, batch_tokens: int, batch_texts: int, most_waiting: int):
        self.model, self.metrics = model, metrics
        self.batch_tokens, self.batch_texts, self.most_waiting = batch_tokens, batch_texts, most_waiting
        self.waiting = 0
        self._turn = self._number = 0
        self._queue: list[_Place] = []
        self._seconds_a_text = 0.0
        self._is_stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"model {model.name}", daemon=True)
        for member in model.members:
            member.batch_size, member.batch_tokens = batch_texts, batch_tokens
        metrics.queue.labels(model.name).set_function(lambda: self.waiting)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Tell whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Let the thread finish what waits, and wait for its end."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, texts: Sequence[Text]) -> Job:
        """Put a request's texts into the queue.

        Raises:
            Refused: 429 where too many texts wait, 503 where the thread stops or has stopped.
        """
        job = Job(texts, left=len(texts), scores=[math.nan] * len(texts))
        job.done.set_running_or_notify_cancel()  # from here on a client that goes away can't cancel it
        with self._changed:
            if self._is_stopping or not self.is_alive:
                raise Refused(503, "the server stops; ask another one, or later.", retry_after=5)
            if self.waiting and self.waiting + len(texts) > self.most_waiting:
                pause = min(max(1, math.ceil(self.waiting * self._seconds_a_text)), LONGEST_PAUSE)
                raise Refused(429, f"{self.waiting} texts wait already; try again in {pause} s.", retry_after=pause)
            job.start, self._number = self._turn, self._number + 1
            self.waiting += len(texts)
            heapq.heappush(self._queue, _Place(job.start, self._number, job, 0))
            self._changed.notify()
        return job

    def give_up(self, job: Job) -> None:
        """Drop a job's texts that have no score yet."""
        with self._changed:
            self.waiting -= job.left
            job.left = 0

    def _run(self) -> None:
        ready: list[_Ready] = []
        while True:
            # 1. What comes next: fair turns from the queue, without those that nobody waits for any more.
            with self._changed:
                ready = [text for text in ready if text.place.job.left]
                while not self._queue and not ready:
                    if self._is_stopping:
                        return
                    self._changed.wait()
                places = self._take(AHEAD * self.batch_texts - len(ready))
            ready += self._encode(places)
            if not ready:
                continue

            # 2. One batch: the text whose turn it is, with those that are as long.
            first = min(range(len(ready)), key=lambda i: ready[i].place[:2])
            self._turn = max(self._turn, ready[first].place.turn)
            lengths = [text.encoded.tokens for text in ready]
            chosen = neighbours(lengths, first, most_tokens=self.batch_tokens, most_rows=self.batch_texts)
            batch = [ready[i] for i in chosen]
            ready = [text for i, text in enumerate(ready) if i not in chosen]

            # 3. Its scores, each to its request.
            began = time.monotonic()
            scores = self._score(batch)
            self._count(batch, time.monotonic() - began)
            for text, score in zip(batch, scores, strict=True):
                self._hand_over(text, score)

    def _take(self, count: int) -> list[_Place]:
        """Take texts from the queue, lowest turn first; called with the lock held."""
        places: list[_Place] = []
        while self._queue and len(places) < count:
            place = self._queue[0]
            if place.job.left == 0:
                heapq.heappop(self._queue)
                continue
            places.append(place)
            if place.row + 1 < len(place.job.texts):
                following = _Place(place.turn + 1, place.number, place.job, place.row + 1)
                heapq.heapreplace(self._queue, following)
            else:
                heapq.heappop(self._queue)
        return places

    def _encode(self, places: Sequence[_Place]) -> list[_Ready]:
        """Encode texts; a job with one that can't be scored ends with the reason."""
        if not places:
            return []
        ready = []
        for place, encoded in zip(places, self.model.encode([p.job.texts[p.row] for p in places]), strict=True):
            if isinstance(encoded, str):
                self._fail(place.job, Refused(422, f"answer {place.row}: {encoded}"))
            else:
                ready.append(_Ready(place, encoded))
        return [text for text in ready if text.place.job.left]

    def _score(self, batch: Sequence[_Ready]) -> list[float | Refused]:
        """Return the scores of a batch; where it fails, halves of it are tried, so that one text does not take others along."""
        try:
            texts = [text.place.job.texts[text.place.row] for text in batch]
            return list(self.model.score(texts, [text.encoded for text in batch]))
        except Exception as error:  # whatever a network raises: out of memory, above all
            if len(batch) > 1:
                middle = len(batch) // 2
                return [*self._score(batch[:middle]), *self._score(batch[middle:])]
            # The message may hold a person's text; the lines of code do not.
            log.error(
                "%s: %s\n%s", self.model.name, type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
            )
            return [Refused(500, f"the model failed ({type(error).__name__}); the server's log says where.")]

    def _hand_over(self, text: _Ready, score: float | Refused) -> None:
        """Give a job one of its scores, and its answer if that was the last one."""
        (_, _, job, row), encoded = text
        if isinstance(score, Refused):
            self._fail(job, score)
        elif not math.isfinite(score):
            self._fail(job, Refused(422, f"answer {row}: its score is not a finite number ({score})."))
        else:
            with self._changed:
                if not job.left:
                    return
                job.scores[row] = score
                job.tokens += encoded.tokens
                job.cut += encoded.is_cut
                job.left -= 1
                self.waiting -= 1
                is_whole = job.left == 0
            if is_whole:
                job.done.set_result(Scored(job.scores, job.tokens, job.cut))

    def _fail(self, job: Job, refusal: Refused) -> None:
        if job.left:
            self.give_up(job)
            job.done.set_exception(refusal)

    def _count(self, batch: Sequence[_Ready], seconds: float) -> None:
        """Count a batch that was scored, and how long a text takes."""
        name, lengths = self.model.name, [text.encoded.tokens for text in batch]
        a_text = seconds / len(batch)
        self._seconds_a_text = 0.9 * self._seconds_a_text + 0.1 * a_text if self._seconds_a_text else a_text
        self.metrics.batch_texts.labels(name).observe(len(batch))
        self.metrics.texts.labels(name).inc(len(batch))
        self.metrics.tokens.labels(name).inc(sum(lengths))
        self.metrics.padding.labels(name).inc(max(lengths) * len(batch) - sum(lengths))
        self.metrics.cut.labels(name).inc(sum(text.encoded.is_cut for text in batch))
        self.metrics.forward_seconds.labels(name).observe(seconds)


def neighbours(lengths: Sequence[int], first: int, *, most_tokens: int, most_rows: int) -> set[int]:
    """Return the rows that are scored together with row `first`: those whose lengths are nearest to its own.

    They fit into `most_tokens`, padding included, and not too much of that is padding.

    >>> sorted(neighbours([900, 10, 950, 12, 11], 4, most_tokens=4096, most_rows=64))
    [1, 3, 4]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    low = high = order.index(first)
    total = lengths[first]
    while high - low + 1 < most_rows:
        longest, rows = lengths[order[high]], high - low + 2
        options = []  # (padding, tokens, which end grows)
        if low > 0:
            shorter = lengths[order[low - 1]]
            options.append((longest * rows - total - shorter, longest * rows, "low"))
        if high + 1 < len(order):
            longer = lengths[order[high + 1]]
            options.append((longer * rows - total - longer, longer * rows, "high"))
        fitting = [
            option
            for option in options
            if option[1] <= most_tokens and option[0] <= max(PADDING * option[1], FREE_PADDING)
        ]
        if not fitting:
            break
        if min(fitting)[2] == "low":
            low -= 1
            total += lengths[order[low]]
        else:
            high += 1
            total += lengths[order[high]]
    return set(order[low : high + 1])

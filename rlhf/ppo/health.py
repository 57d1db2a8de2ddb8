"""The monitor of PPO: what goes wrong before anybody notices is looked for after every rollout and told once, in plain words.

Reward and losses do not show a collapse (arXiv:2307.04964 section 5.3); KL, length, repetition and entropy do.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, log, sqrt
from statistics import fmean, variance

from scipy.stats import t

Row = dict[str, float]
SETTLED = 10  # logs after which a critic should know something
CUT = "no end"
MOST_CUT, ACCEPTABLE_CUT = 0.5, 0.2  # the share of cut answers that is told of, and that a new limit aims at
WINDOW = 5  # rollouts, at the least, whose mean rewards are compared
FALSE_ALARM = 0.01  # the chance of "hacking" in a run of any length whose true reward only scatters


@dataclass(frozen=True)
class Concern:
    """One thing to look for.

    Attributes:
        name: by which it is remembered that it was raised.
        needs: metrics without which nothing is looked for.
        applies: whether the trouble is there, by the metrics of the first log, of the latest, and the number of logs.
        sentence: for a person, with the latest metrics as fields and those of the first as `first_…`.
    """

    name: str
    needs: tuple[str, ...]
    applies: Callable[[Row, Row, int], bool]
    sentence: str


CONCERNS = (
    Concern(
        "ratio", ("ratio_first",), lambda first, now, n: abs(now["ratio_first"] - 1) > 0.05,
        "the ratio of a rollout's first minibatch is {ratio_first:.3f}, not 1: sampling and training see different models.",
    ),
    Concern(
        "negative KL", ("kl", "kl_k3"),
        lambda first, now, n: now["kl"] < -0.5 and now["kl_k3"] - now.get("kl_rounding", 0.0) > 0.5,
        "the KL is {kl:.2f} nats an answer by k1 and {kl_k3:.2f} by k3: answers are not sampled from the policy's whole "
        "distribution.",
    ),
    Concern(
        "length", ("length", "share_without_eos"),
        lambda first, now, n: now["length"] > 2 * first["length"] and now["share_without_eos"] > first["share_without_eos"] + 0.1,
        "answers have grown from {first_length:.0f} to {length:.0f} tokens, and {share_without_eos:.0%} do not end: the reward may "
        "pay for length.",
    ),
    Concern(
        "short", ("length",), lambda first, now, n: now["length"] < 0.25 * first["length"],
        "answers have shrunk from {first_length:.0f} to {length:.0f} tokens.",
    ),
    Concern(
        "repetition", ("distinct_2",), lambda first, now, n: now["distinct_2"] < 0.5 * first["distinct_2"],
        "of all pairs of neighbouring tokens {distinct_2:.0%} are different ones, {first_distinct_2:.0%} at the start: answers "
        "become the same.",
    ),
    Concern(
        "entropy", ("entropy",), lambda first, now, n: now["entropy"] < 0.2 * first["entropy"],
        "entropy has fallen from {first_entropy:.2f} to {entropy:.2f} nats a token: little is explored; raise kl_coef.",
    ),
    Concern(
        "perplexity", ("nll_reference",), lambda first, now, n: now["nll_reference"] > first["nll_reference"] + 1,
        "answers cost the reference {nll_reference:.2f} nats a token, {first_nll_reference:.2f} at the start: they leave the "
        "language that it knows; raise kl_coef.",
    ),
    Concern(
        "critic", ("explained_variance",),
        lambda first, now, n: n >= SETTLED and now["explained_variance"] < 0 and "value_slope" not in now,
        "the critic explains nothing (explained variance {explained_variance:.2f}): raise critic_learning_rate or critic_warmup; "
        "calibrate_values makes its values count for no more than they explain.",
    ),
    Concern(
        "calibrated critic", ("explained_variance", "value_slope"),
        lambda first, now, n: n >= SETTLED and now["explained_variance"] < 0,
        "the critic explains nothing (explained variance {explained_variance:.2f}): raise critic_learning_rate or critic_warmup. "
        "calibrate_values is on, and takes {value_slope:.2f} of its values.",
    ),
    Concern(
        "reward tail", ("clipped_rewards",), lambda first, now, n: now["clipped_rewards"] > 0.2,
        "{clipped_rewards:.0%} of the rewards are at reward_clip, where they are all alike: they are on another scale than PPO "
        "takes them for (a reward model's card, reward_weights), or reward_clip is too near.",
    ),
    Concern(
        "disagreement", ("disagreement",), lambda first, now, n: now["disagreement"] > 2 * first["disagreement"],
        "the reward models of the ensemble lie {disagreement:.2f} deviations apart, {first_disagreement:.2f} at the start: the "
        "answers have left what they were trained on; raise kl_coef, or label some of them.",
    ),
    Concern(
        "cloud", ("outside_cloud", "outside_limit"), lambda first, now, n: now["outside_cloud"] > now["outside_limit"],
        "{outside_cloud:.0%} of the answers lie outside those of SFT in the reward model's code, and up to {outside_limit:.0%} "
        "could be chance: it judges what it was not made on; raise kl_coef, or label some of them.",
    ),
    Concern(
        "constant reward", ("reward_deviation", "reward_proxy"),
        lambda first, now, n: n > 1 and first["reward_deviation"] == now["reward_deviation"] == 0,
        "the reward gives all answers of a rollout the same score, {reward_proxy:.2f} now and {first_reward_proxy:.2f} at the "
        "start, so there is nothing to learn but the critic's noise: look at the reward.",
    ),
    Concern(
        "hacking", ("chance_of_rise", "chance_of_fall"),
        lambda first, now, n: n >= 2 * WINDOW and max(now["chance_of_rise"], now["chance_of_fall"]) < chance_at(n - 2 * WINDOW + 1),
        "from the first {window:.0f} rollouts to the last {window:.0f} the reward model's score has risen from {early_proxy:.2f} "
        "to {late_proxy:.2f} and the true reward has fallen from {early_gold:.2f} to {late_gold:.2f}, beyond chance: the reward "
        "model seems to be exploited; raise kl_coef.",
    ),
)  # fmt: skip


def chance_at(look: int) -> float:
    """Return the chance of a false alarm that the k-th of many looks may have: 1/(k (k + 1)) of `FALSE_ALARM`, which is the sum.

    Args:
        look: k, the number of the look, from 1.

    >>> sum(chance_at(look) for look in range(1, 100_000)) <= FALSE_ALARM
    True
    """
    return FALSE_ALARM / (look * (look + 1))


def chance_of_rise(early: list[float], late: list[float]) -> float:
    """Return the chance that as many rollouts of one mean differ as much: Student's t of two samples of one size, one-sided.

    >>> chance_of_rise([1.0, 2.0], [1.0, 2.0]), round(chance_of_rise([1.0, 1.2], [2.0, 2.2]), 3)
    (0.5, 0.01)
    """
    count = len(early)
    error = sqrt((variance(early) + variance(late)) / count)
    return float(t.sf((fmean(late) - fmean(early)) / max(error, 1e-9), 2 * count - 2))


def cut_answers(share_cut: float, *, limit: int, penalty: float | None) -> str:
    """Say how many answers were cut, which keys change that, and to what.

    >>> cut_answers(0.75, limit=48, penalty=1.0)  # doctest: +NORMALIZE_WHITESPACE
    '75% of the answers were cut at 48 tokens, before their end, and PPO learns little from such. Raise
    ppo.max_completion_length from 48 to about 192; where answers should be this short, raise ppo.missing_eos_penalty from 1 to
    2, so that PPO learns to end them.'
    """
    penalty_now = "ppo.missing_eos_penalty" + (f" from {penalty:g}" if penalty else "")
    return (
        f"{share_cut:.0%} of the answers were cut at {limit} tokens, before their end, and PPO learns little from such. Raise "
        f"ppo.max_completion_length from {limit} to about {longer_limit(share_cut, limit)}; where answers should be this short, "
        f"{'raise' if penalty else 'set'} {penalty_now} to {2 * penalty if penalty else 1:g}, so that PPO learns to end them."
    )


def longer_limit(share_cut: float, limit: int) -> int:
    """Return a limit in tokens under which a fifth of the answers would be cut, at most four times the present one.

    If every token ends an answer with one probability, a share s is cut at L tokens and s^(L'/L) at L'; so
    L' = L · ln 0.2 / ln s, here in steps of 16.

    Args:
        share_cut: s > 0.2.

    >>> longer_limit(0.6, 100), longer_limit(0.9, 100), longer_limit(1.0, 100)
    (320, 400, 400)
    """
    times = 4.0 if share_cut >= 1 else min(4.0, log(ACCEPTABLE_CUT) / log(share_cut))
    return 16 * ceil(times * limit / 16)


@dataclass
class Health:
    """The monitor's memory of a run: every concern is raised once, also where the run is resumed in between.

    Attributes:
        sentences: those told so far.
        raised: the names of their concerns.
        first: metrics of the first log.
        rollouts: how many logs were looked at; each is of one rollout where nothing else is asked for.
        rewards: raw score and true reward of every log, where both are known.
    """

    sentences: list[str] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    first: Row = field(default_factory=dict)
    rollouts: int = 0
    rewards: list[list[float]] = field(default_factory=list)

    def look(self, row: Row, *, rollout: int | None = None) -> list[str]:
        """Return the sentences on what is new to worry about at a log of these metrics.

        Args:
            rollout: the number of the last one, from 1; by default that of the log.
        """
        self.rollouts += 1
        row = {**row, **self._trends(row)}
        self.first = self.first or {name: float(value) for name, value in row.items()}
        sentences = []
        for concern in CONCERNS:
            known = all(name in row and name in self.first for name in concern.needs)
            if concern.name not in self.raised and known and concern.applies(self.first, row, self.rollouts):
                self.raised.append(concern.name)
                values = {**row, **{f"first_{name}": value for name, value in self.first.items()}}
                sentences.append(f"ppo, rollout {rollout or self.rollouts}: " + concern.sentence.format(**values))
        self.sentences += sentences
        return sentences

    def look_at_ends(self, share_cut: float, *, rollout: int, limit: int, penalty: float | None) -> list[str]:
        """Return a sentence where most answers of a rollout were cut; it needs no log, so the first rollout is told of at once.

        Args:
            share_cut: of the rollout's answers, those that did not end.
            rollout: its number, from 1.
            limit, penalty: `max_completion_length` and `missing_eos_penalty`.
        """
        if share_cut <= MOST_CUT or CUT in self.raised:
            return []
        self.raised.append(CUT)
        sentence = f"ppo, rollout {rollout}: {cut_answers(share_cut, limit=limit, penalty=penalty)}"
        self.sentences.append(sentence)
        return [sentence]

    def _trends(self, row: Row) -> Row:
        """Compare scores and true rewards of the first rollouts with those of the last: of a quarter of all each, five at least."""
        if "reward_proxy" not in row or "reward_gold" not in row:
            return {}
        self.rewards.append([float(row["reward_proxy"]), float(row["reward_gold"])])
        if len(self.rewards) < 2 * WINDOW:
            return {"chance_of_rise": 1.0, "chance_of_fall": 1.0}
        window = max(WINDOW, len(self.rewards) // 4)
        (early_proxy, early_gold), (late_proxy, late_gold) = (
            tuple(list(column) for column in zip(*part, strict=True))
            for part in (self.rewards[:window], self.rewards[-window:])
        )
        return {
            "chance_of_rise": chance_of_rise(early_proxy, late_proxy),
            "chance_of_fall": chance_of_rise(late_gold, early_gold),
            "window": float(window),
            "early_proxy": fmean(early_proxy),
            "late_proxy": fmean(late_proxy),
            "early_gold": fmean(early_gold),
            "late_gold": fmean(late_gold),
        }

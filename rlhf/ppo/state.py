"""PPO's memory between rollouts beside its weights: the KL's coefficient, the history of rewards. Checkpointed."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlhf.invariants.checks import CheckBook
from rlhf.invariants.sampler import MomentSums
from rlhf.objectives.kl import adapted_kl_coef
from rlhf.ppo.health import Health

STATE_FILE = "ppo_state.json"
SENTENCES = "said"  # the monitor's sentences, by their key in the file


@dataclass
class GoldenBatch:
    """Token rows, and what the reference says of the answers in them (`rlhf.invariants.reference`).

    Attributes:
        rows: token ids, without padding.
        logprobs: of the last tokens of each row, nats.
        dtype: the coarsest type that they were computed in.
        is_of_this_process: whether they were taken here, and not read from a checkpoint.
    """

    rows: list[list[int]]
    logprobs: list[list[float]]
    dtype: str
    is_of_this_process: bool = field(default=False, compare=False)


@dataclass
class PPOState:
    """Counters and controllers, the same on every process.

    Attributes:
        episodes: answers sampled so far.
        kl_coef: β of this rollout; once its answers are sampled and rewarded, that of the next.
        kl_coef_learnt: β of the rollout that is being learnt from.
        reward_count, reward_mean, reward_square: number, mean and summed squared deviation of all scores so far.
        health: the monitor's memory.
        surprise, counts: the sums of "sampler true" and of "token counts true" over all rollouts so far.
        rounding: squared differences of log-probabilities with autocast and without, nats², and of how many tokens.
        checks: what was checked so far.
        golden: what the reference must go on to say; None before the first rollout.
        stopped: why training ended before its time; None while it goes on.
        stop_rules: the settings that it was ended under, `PPOConfig.stop_rules`.
        steps_per_rollout: of the optimizer; 0 in checkpoints that did not say.
        cuts: what each reward model has counted so far (`RewardModel.counts`), over all processes.
    """

    episodes: int = 0
    kl_coef: float = 0.0
    kl_coef_learnt: float = 0.0
    reward_count: float = 0.0
    reward_mean: float = 0.0
    reward_square: float = 0.0
    health: Health = field(default_factory=Health)
    surprise: MomentSums = field(default_factory=MomentSums)
    counts: MomentSums = field(default_factory=MomentSums)
    rounding: tuple[float, float] = (0.0, 0.0)
    checks: CheckBook = field(default_factory=CheckBook, compare=False)
    golden: GoldenBatch | None = None
    stopped: str | None = None
    stop_rules: dict[str, float | bool | None] = field(default_factory=dict)
    steps_per_rollout: int = 0
    cuts: list[list[int]] = field(default_factory=list)

    def see_rewards(self, count: float, mean: float, square: float) -> None:
        """Add a rollout's scores to the history (Chan et al.: exact, in whatever portions they come).

        Args:
            count, mean, square: number, mean and summed squared deviation of these scores.
        """
        total = self.reward_count + count
        delta = mean - self.reward_mean
        self.reward_square += square + delta**2 * self.reward_count * count / total
        self.reward_mean += delta * count / total
        self.reward_count = total

    @property
    def reward_scale(self) -> tuple[float, float]:
        """Return mean and deviation of all scores so far; (0, 1) before the first."""
        if self.reward_count == 0:
            return 0.0, 1.0
        return self.reward_mean, max(1e-6, (self.reward_square / self.reward_count) ** 0.5)

    def adapt(self, kl: float, *, target: float, horizon: int, episodes: int) -> None:
        """Move β towards a KL of `target` nats an answer."""
        self.kl_coef = adapted_kl_coef(self.kl_coef, kl, target=target, horizon=horizon, episodes=episodes)

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        sums = {"surprise": list(self.surprise), "counts": list(self.counts)}
        values = {**asdict(self), **sums, "checks": self.checks.entries}
        if self.golden is not None:
            del values["golden"]["is_of_this_process"]
        values["health"] = {SENTENCES: values["health"].pop("sentences"), **values["health"]}
        (folder / STATE_FILE).write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "PPOState":
        """Read it from a checkpoint."""
        values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        health = Health(sentences=values["health"].pop(SENTENCES), **values["health"])
        checks = CheckBook()
        checks.merge(values.pop("checks", {}))
        sums = {name: MomentSums(*values.pop(name, ())) for name in ("surprise", "counts")}
        kept = values.pop("golden", None)
        golden = GoldenBatch(**kept) if kept and "dtype" in kept else None  # earlier versions took them under autocast
        rounding = tuple(values.pop("rounding", (0.0, 0.0)))
        known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        made = {"health": health, **sums, "checks": checks, "golden": golden, "rounding": rounding}
        return cls(**{**known, **made})

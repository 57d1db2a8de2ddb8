"""The sections of a recipe. Our own keys are typed here; every other key of a stage is one of TRL's flat names."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from rlhf.addresses import hide_secrets
from rlhf.recipe.objectives import EXTRAS, OBJECTIVES, ExtraName, ObjectiveName

# The attributes of HelpSteer2 as weights of one score, verbosity being a fault (arXiv:2406.08673, of its Llama-3-70B).
ATTRIBUTES = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45, "complexity": 0.55, "verbosity": -0.4}
RATING_SCALE = (0.0, 4.0)  # HelpSteer's
STAGE_SECTIONS = ("sft", "vote", "reward", "ppo")
DATA_SOURCES = ("sft", "preferences", "prompts", "test")


class Section(BaseModel):
    """A section of keys of ours: an unknown key or a value of another type is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class LabSection(Section):
    """A world whose true reward is known; data and `evaluate.gold` come from it, and of the world of lists the base model too.

    In the world of instructions `backbone.model` answers: nobody writes demonstrations, and no model is made.
    """

    world: Literal["lists", "instructions"] = "lists"
    demonstrations: int = Field(8000, ge=100)
    pairs: int = Field(6000, ge=100)
    answers: int = Field(2, ge=2)  # to each prompt of the training pairs, every two of them compared
    test_pairs: int = Field(1000, ge=50)
    hidden_size: int = Field(128, ge=16, multiple_of=8)
    num_hidden_layers: int = Field(3, ge=1)
    annotators: Literal["crowd", "exact"] = "crowd"  # exact: the true reward decides every label
    flip_rate: float = Field(0.0, ge=0, lt=0.5)  # share of the annotators' labels that is flipped at random
    critiques: bool = False  # every pair has truthful critiques of its answers
    critic_error_rate: float | None = Field(
        None, gt=0, le=0.5
    )  # of a critic that the crowd hears (recursive assistance)

    @property
    def is_sampled(self) -> bool:
        """Tell whether the backbone gives the answers, and not the world's own writers."""
        return self.world == "instructions"

    @model_serializer(mode="wrap")
    def _as_used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the values that this world has; what is as it always was is not named, so that its keys stay."""
        unused = {"demonstrations", "hidden_size", "num_hidden_layers"} if self.is_sampled else {"world", "answers"}
        unused |= {"critic_error_rate"} if self.critic_error_rate is None else set()
        unused |= set() if self.critiques else {"critiques"}
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if key not in unused}


class BackboneSection(Section):
    """The base model: a hub id or folder, or a small model built from nothing."""

    model: str | None = None
    revision: str | None = None
    from_scratch: dict[str, Any] | None = None

    def named(self) -> dict[str, Any]:
        """Return the keys that are set; a null within `from_scratch` is a value."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


def _with_text_keys(value: object) -> object:
    """Return a mapping with its keys as text, as JSON and a resolved recipe write them: YAML reads 1 and true as themselves."""
    return {str(key): side for key, side in value.items()} if isinstance(value, dict) else value


class SourceEntry(Section):
    """One source of a mixture: a hub id or local file, the fraction of its prompts to take, a cap.

    `preference` says what the values of its preference column mean, where the file does not: `{0: first, 1: second}`.
    `columns` says which of its columns is which, where its layout is not known: `{prompt: question, chosen: answers.good}`.
    `label` names the column that says which answer is better, where a layout has several (PKU-SafeRLHF).
    """

    source: str
    config: str | None = None
    split: str | None = None
    columns: dict[str, str] | None = Field(None, min_length=1)
    label: str | None = None
    fraction: float = Field(1.0, gt=0, le=1)
    max_rows: int | None = Field(None, ge=1)
    preference: Annotated[
        dict[str, Literal["first", "second", "tie"]] | None, BeforeValidator(_with_text_keys), Field(min_length=1)
    ] = None


# A name that may be a web address: its secrets are used and never written.
Address = Annotated[str, PlainSerializer(hide_secrets)]

Sources = str | SourceEntry | list[str | SourceEntry]


class DataSection(Section):
    """Hub ids or local files (json, jsonl, csv, tsv, gz, parquet, a pattern, a saved folder), or a list of them.

    Each is optional where `lab:` makes it; `{source: …}` stands for one of which more is to be said.
    """

    sft: Sources | None = None
    preferences: Sources | None = None
    prompts: Sources | None = None
    test: Sources | None = None
    test_fraction: float = Field(0.1, gt=0, lt=1)
    leakage: Literal["refuse", "drop", "allow"] = "refuse"
    compare: Literal["answers", "conversations"] = "answers"
    max_characters: int | None = Field(None, ge=1)  # of a conversation; longer ones are left out on both sides
    max_pairs_per_prompt: int | None = Field(None, ge=1)
    max_sft: int | None = Field(None, ge=1)
    max_pairs: int | None = Field(None, ge=1)
    max_prompts: int | None = Field(None, ge=1)

    def sources(self, name: str) -> list[SourceEntry]:
        """Return what `sft`, `preferences`, `prompts` or `test` names, as a mixture."""
        value = getattr(self, name)
        entries = [] if value is None else value if isinstance(value, list) else [value]
        return [SourceEntry(source=entry) if isinstance(entry, str) else entry for entry in entries]


class StageSection(BaseModel):
    """A training stage; the keys that are not declared are TRL's and are checked against `trl_keys.json`."""

    model_config = ConfigDict(extra="allow", strict=True)

    def trl_settings(self) -> dict[str, Any]:
        """Return the keys that go to TRL untouched."""
        return dict(self.model_extra or {})


class VoteSection(StageSection):
    """Preference strength by voting, where `reward.objective` asks for it; TRL's keys are those of `reward` unless set here."""

    members: int = Field(10, ge=1)
    folds: int = Field(5, ge=2)
    in_sample: bool = False
    trunk: int | None = Field(None, ge=1)  # layers that each member has of its own above a shared frozen trunk
    flip_rate: float = Field(0.0, ge=0, lt=0.5)  # share of wrong labels in the members' likelihood

    def shape(self) -> dict[str, Any]:
        """Return what `rlhf.pipeline.vote.vote` takes beside TRL's keys."""
        return self.model_dump(exclude=set(self.trl_settings()))


class RewardSection(StageSection):
    """The reward model; `rlhf.recipe.objectives` says what each objective needs and does."""

    objective: ObjectiveName = "bt"
    flip_rate: float = Field(0.0, ge=0, lt=0.5)
    flip_by: Literal["rank", "sign"] = "rank"
    flip_fraction: float = Field(0.1, gt=0, le=1)
    smoothing: float = Field(0.2, ge=0, lt=0.5)
    smoothing_mask: Literal["negative", "all", "negative+strong"] = "negative"
    margin_scale: float = 1.0
    margin_clip: float | None = Field(None, gt=0)
    group_weight: Literal["prompt"] | None = None  # every prompt counts the same, however many pairs it has

    # Attribute regression: the attributes that are rated with their weights in the score, and the ratings that there may be.
    # `ratings_first`: a first model learns the ratings, and the objective, which is one of pairs, goes on from its weights.
    ratings_first: bool = False
    attributes: dict[str, float] | None = Field(None, min_length=1)
    rating_scale: list[float] | None = Field(None, min_length=2, max_length=2)

    # A term beside the loss (`EXTRAS`), its own numbers unless set here; all but the weight are for contrastive ones.
    extra: ExtraName | None = None
    extra_weight: float | None = Field(None, ge=0)
    extra_temperature: float | None = Field(None, gt=0)
    prototypes: int | None = Field(None, ge=2)
    dropout: float = Field(0.05, gt=0, lt=1)

    # Critiques (`rlhf.reward.critiques`): the most tokens of one, and how many are written for a score, which is their mean.
    critique_tokens: int = Field(64, ge=1)
    critiques: int = Field(1, ge=1)

    # MetaRM (`rlhf.reward.meta`): on answers that the run samples, or on those of a file.
    meta: bool = False
    meta_samples: str | None = None
    meta_pool: int = Field(512, ge=1)
    meta_responses: int = Field(5, ge=2)
    meta_prompts: int = Field(16, ge=1)
    meta_step: float = Field(0.01, ge=0)
    meta_normalized: bool = True

    # An ensemble of this size: other orders and random starts; PPO combines it by `ppo.reward_ensemble` (default: mean).
    members: int = Field(1, ge=1)

    # One LoRA expert for each `source` of pairs (`rlhf.reward.experts`).
    experts: Literal["gate", "weights", "merged"] | None = None
    expert_weights: dict[str, float] | None = None

    @property
    def needs_vote(self) -> bool:
        """Tell whether a `vote` stage comes before."""
        return OBJECTIVES[self.objective].needs.vote

    @property
    def needs_ratings(self) -> bool:
        """Tell whether answers are read with the ratings of their attributes."""
        return OBJECTIVES[self.objective].needs.ratings

    @property
    def reads_ratings(self) -> bool:
        """Tell whether ratings are read at all: by the objective, or by a first model."""
        return self.needs_ratings or self.ratings_first

    @property
    def attribute_weights(self) -> dict[str, float]:
        """Return the attributes that are rated, with their weights in the score; HelpSteer2's unless set here."""
        return dict(self.attributes or ATTRIBUTES)

    def ratings(self) -> dict[str, Any]:
        """Return what `rlhf.data.ratings.RatingScale` takes."""
        low, high = self.rating_scale or RATING_SCALE
        return {"names": tuple(self.attribute_weights), "low": low, "high": high}

    @model_serializer(mode="wrap")
    def _as_used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the values; those of ratings and critiques only where there are some, so that the keys of other runs stay."""
        values: dict[str, Any] = handler(self)
        unused = [] if self.reads_ratings else ["attributes", "rating_scale"]
        unused += [] if self.ratings_first else ["ratings_first"]
        unused += [] if self.extra_kind == "critique" else ["critique_tokens", "critiques"]
        return {key: value for key, value in values.items() if key not in unused}

    def denoise_config(self) -> dict[str, Any]:
        """Return what `rlhf.reward.denoise.DenoiseConfig` takes."""
        numbers = {"flip_by", "flip_fraction", "smoothing", "smoothing_mask", "margin_scale", "margin_clip"}
        return self.model_dump(include={"objective", *numbers})

    @property
    def extra_kind(self) -> str | None:
        """Return which kind of term there is beside the loss, if any."""
        return None if self.extra is None else EXTRAS[self.extra].kind

    def contrast(self) -> dict[str, Any]:
        """Return what `rlhf.ContrastiveRewardTrainer` takes."""
        return self.model_dump(include={"extra", "extra_weight", "extra_temperature", "prototypes", "dropout"})

    def ascent(self) -> dict[str, Any]:
        """Return what `rlhf.MetaRewardTrainer` takes beside that."""
        return self.model_dump(include={"meta_step", "meta_normalized", "meta_prompts"})


class PPOSection(StageSection):
    """PPO; rewards beside the run's own reward model: folders of others, http addresses, FILE.py:function as `evaluate.gold`."""

    extra_rewards: list[Address] = Field(default_factory=list)


class SamplingSection(Section):
    """How answers are sampled: for rounds, for evaluation, in the world of instructions, for a reward model's scale.

    PPO samples at this temperature too, unless `ppo.temperature` names another; its engine is `ppo.use_vllm`.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    temperature: float = Field(1.0, ge=0.01, le=100)

    @model_serializer(mode="wrap")
    def _as_used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the values without a temperature of 1, which runs have that were begun before it was a key."""
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if key != "temperature" or value != 1}


class EvaluateSection(Section):
    """The prompts that policies are evaluated on, and the true reward where there is one."""

    gold: str | None = Field(None, pattern=r".+\.py:[A-Za-z_]\w*$")
    prompts: int = Field(512, ge=1)
    answers: int = Field(1, ge=1, le=16)  # of the policy to each prompt, beside as many of SFT

    @model_serializer(mode="wrap")
    def _as_used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the values without a single answer, which runs have that were begun before it was a key."""
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if key != "answers" or value != 1}


class RoundsSection(Section):
    """Iterative RLHF: from the second round on, the policy's own answers are labelled and pooled with what was there."""

    count: int = Field(1, ge=1)
    first: Literal["offline", "sampled"] = "offline"  # round 1: the recipe's preferences, or SFT's own answers

    # What is labelled, by whom.
    labels_from: Literal["lab", "people", "judge", "verdicts", "dataset"] = "lab"
    prompts: int = Field(512, ge=1)
    responses: int = Field(4, ge=2)
    labels: int = Field(500, ge=1)
    second_look: float | None = Field(None, gt=0, lt=1)  # share of `labels` that experts give to pairs which have one
    select: Literal["random", "deviation", "information", "diversity"] = "random"
    annotators_per_pair: int = Field(1, ge=1)
    judge_url: Address | None = None
    judge_model: str | None = None  # its name at the endpoint; for verdicts the folder or hub id of a causal model
    judge_key: str | None = None  # an environment variable's name
    judge_budget: int | None = Field(None, ge=2)
    age_weight: float = Field(1.0, gt=0, le=1)  # weight of a pair, for every round since it was labelled

    # Where PPO starts, and what its KL is measured to.
    start: Literal["sft", "previous"] = "previous"
    reference: Literal["sft", "previous"] = "sft"

    # When to stop before `count`.
    stop_when_worse: bool = True
    min_fresh_accuracy: float | None = Field(None, gt=0, lt=1)
    kl_limit: float | None = Field(None, gt=0)
    max_noise: float | None = Field(None, gt=0, lt=0.5)

    def sampling(self) -> dict[str, Any]:
        """Return what the `sample` stage of a round depends on."""
        return self.model_dump(include={"prompts", "responses"})

    @property
    def looked_at(self) -> int:
        """Return how many of a round's labels are second looks; the others are for new pairs."""
        return round((self.second_look or 0) * self.labels)

    def selection(self) -> dict[str, Any]:
        """Return what the `select` stage of a round depends on."""
        return {"labels": self.labels - self.looked_at, "select": self.select}

    def labelling(self) -> dict[str, Any]:
        """Return what the `label` stage of a round depends on, in every round alike."""
        names = {"labels_from", "annotators_per_pair", "age_weight", "judge_url", "judge_model", "judge_budget"}
        return self.model_dump(include=names, exclude_none=True)


class Recipe(Section):
    """A whole pipeline, resolved and checked."""

    name: str = Field(pattern=r"^\w[\w.-]*$", max_length=100)
    seed: int = Field(0, ge=0)
    lab: LabSection | None = None
    backbone: BackboneSection = Field(default_factory=BackboneSection)
    data: DataSection = Field(default_factory=DataSection)
    sft: StageSection = Field(default_factory=StageSection)
    vote: VoteSection = Field(default_factory=VoteSection)
    reward: RewardSection = Field(default_factory=RewardSection)
    ppo: PPOSection = Field(default_factory=PPOSection)
    rounds: RoundsSection = Field(default_factory=RoundsSection)
    sampling: SamplingSection = Field(default_factory=SamplingSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    # Where it was read: `file`, `base`, `overrides`, and `differences` from the base (or, without one, from the file).
    _origin: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _sample_at_one_temperature(self) -> "Recipe":
        """Let PPO sample as everything else does, unless it names a temperature of its own."""
        if self.sampling.temperature != 1 and self.ppo.model_extra is not None:
            self.ppo.model_extra.setdefault("temperature", self.sampling.temperature)
        return self

    @property
    def origin(self) -> dict[str, Any]:
        """Return where this recipe was read; for the report, not for any result."""
        return self._origin

    @property
    def has_sft(self) -> bool:
        """Tell whether there is an SFT stage; where there are no demonstrations, the backbone can answer already."""
        return self.data.sft is not None or (self.lab is not None and not self.lab.is_sampled)

    @property
    def needs_vote(self) -> bool:
        """Tell whether reward models vote on the labels: for the objective, or for second looks."""
        return self.reward.needs_vote or self.rounds.looked_at > 0

    def vote_settings(self) -> dict[str, Any]:
        """Return TRL's keys of a member of the vote: those of `reward`, and of `vote` on top."""
        return self.reward.trl_settings() | self.vote.trl_settings()

    def resolved(self) -> dict[str, Any]:
        """Return everything that was decided, defaults of ours included: what is written to `RUN/recipe.yaml`."""
        values = self.model_dump(exclude_none=True)
        for name in STAGE_SECTIONS:  # a null of TRL's is a value, and seldom the default
            values[name] |= {key: None for key, value in getattr(self, name).trl_settings().items() if value is None}
        values["backbone"] = self.backbone.named()
        if values["ppo"].get("temperature") == self.sampling.temperature:  # read again, PPO takes it from there
            del values["ppo"]["temperature"]
        return values

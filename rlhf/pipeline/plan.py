"""Every stage of a recipe on one page: in which round, with which settings, from which parents."""

from pathlib import Path
from typing import Any, Protocol

from rlhf.data.read import is_local
from rlhf.data.tables import local_files
from rlhf.errors import UserError
from rlhf.models.gguf import gguf_file
from rlhf.pipeline.digests import known_digest, named_digests
from rlhf.pipeline.store import Stage
from rlhf.ppo.source_kinds import verdict_model
from rlhf.recipe.schema import DATA_SOURCES, Recipe, StageSection

# Keys of TRL's that may name a file.
PATH_KEYS = ("chat_template_path", "accelerator_config", "deepspeed", "fsdp_config")


class Add(Protocol):
    """Add a stage to a plan: its name, folder, settings, and parents by role."""

    def __call__(self, name: str, folder: str, settings: dict[str, Any], **parents: Stage) -> Stage:
        """Return the stage that was added."""
        ...


def plan(recipe: Recipe) -> list[Stage]:
    """List every stage of a recipe in order. Keys follow from settings alone, so nothing has to run to know what is done."""
    stages: list[Stage] = []

    def add(name: str, folder: str, settings: dict[str, Any], **parents: Stage) -> Stage:
        stage = Stage(name, folder, settings, recipe.seed, parents)
        stages.append(stage)
        return stage

    start = _start(recipe, add)
    before: dict[str, Stage] = {}
    for number in range(1, recipe.rounds.count + 1):
        before = _round(recipe, number, start, before, add)
    return stages


def stages_until(stages: list[Stage], until: str | None) -> list[Stage]:
    """Return the stages up to the first of a name, or that of a folder ("round-2/label").

    Raises:
        UserError: the plan has none.
    """
    if until is None:
        return stages
    for number, stage in enumerate(stages, start=1):
        if until in (stage.name, stage.folder):
            return stages[:number]
    raise UserError(f"--until {until}: this recipe has the stages {', '.join(stage.folder for stage in stages)}.")


def _start(recipe: Recipe, add: Add) -> dict[str, Stage]:
    """Add round 0: data, base model, SFT.

    Returns:
        `data`, and `sft` where there is one, else `base` where the backbone is a GGUF file.
    """
    origins: dict[str, Stage] = {}
    backbone, model = recipe.backbone.named(), recipe.backbone.model
    if (
        model is not None and gguf_file(model) is not None
    ):  # an ordinary checkpoint is made of it, for every later stage
        origins["base"] = add("base", "round-0/base", backbone | _files(model))
    if recipe.lab is not None:
        settings, parents = recipe.lab.model_dump(), {}
        if recipe.lab.is_sampled:
            settings |= {"backbone": backbone} | _sampling(recipe) | _engine(recipe) | _files(model)
            parents = dict(origins)
        origins["lab"] = add("lab", "round-0/lab", settings, **parents)
    data_settings = recipe.data.model_dump(exclude_none=True) | {"sha256": _local_digests(recipe)}
    if recipe.reward.reads_ratings:
        data_settings["ratings"] = recipe.reward.ratings()
    if recipe.reward.extra_kind == "critique":
        data_settings["critiques"] = True
    data = add("data", "round-0/data", data_settings, **origins)
    if recipe.backbone.from_scratch is not None:
        origins = {"base": add("base", "round-0/base", backbone, data=data)}
    elif model is not None:
        origins.pop("lab", None)
    if not recipe.has_sft:
        return {"data": data} | origins  # the backbone can answer already, and takes SFT's place
    settings = recipe.sft.model_dump() | {"backbone": backbone} | _shown(recipe) | _gold(recipe)
    settings |= _files(recipe.backbone.model, recipe.evaluate.gold, *_paths(recipe.sft))
    return {"data": data, "sft": add("sft", "round-0/sft", settings, data=data, **origins)}


def _round(
    recipe: Recipe, number: int, start: dict[str, Stage], before: dict[str, Stage], add: Add
) -> dict[str, Stage]:
    """Add one round: labels, vote, reward model, PPO, evaluation.

    Args:
        start: `data`, and `sft` where there is one.
        before: what this function returned for the round before; empty for the first.

    Returns:
        what the next round reads: `label` and `second_look` where there are such stages, `reward`, `policy`, and three
        evaluations: `first_evaluation`, the first round's; `latest_evaluation`, this one's; `older_evaluation`, that of the round
        before.
    """
    folder, config, rounds = f"round-{number}", recipe.reward, recipe.rounds
    backbone = _backbone(recipe, start)
    sampling, gold = _sampling(recipe), _gold(recipe)
    voting = recipe.vote.model_dump() | recipe.vote_settings()
    model, function = None if "sft" in start else recipe.backbone.model, recipe.evaluate.gold

    # 1. Answers of the latest policy and their labels; what is trained on these reads them as a second look left them.
    policy_before = {"policy": before["policy"]} if before else {}
    samples_for_meta = config.meta and config.meta_samples is None
    sample, label, look = _labels(recipe, number, start, before, add)

    # 2. Vote and reward model.
    labelled = {"label": look["second_look"]} if look else label
    vote: dict[str, Stage] = {}
    if config.needs_vote:
        settings = voting | backbone | gold | _files(model, function, *_paths(config), *_paths(recipe.vote))
        vote = {"vote": add("vote", f"{folder}/vote", settings, **start, **labelled)}
    settings = config.model_dump() | backbone | sampling | gold | _files(model, function, *_paths(config))
    if config.meta and not samples_for_meta:
        settings["meta_sha256"] = known_digest(Path(str(config.meta_samples)).expanduser())
    evaluations: dict[str, Stage] = {
        role: before[role] for role in ("latest_evaluation", "older_evaluation") if role in before
    }
    parents: dict[str, Stage] = {**labelled, **vote, **(sample if samples_for_meta else {}), **evaluations}
    reward = add("reward", f"{folder}/reward", settings, **start, **parents)

    # 3. PPO, and its evaluation; SFT's answers are those of the first one and are not sampled again.
    sources = [verdict_model(name) or name for name in recipe.ppo.extra_rewards]
    settings = recipe.ppo.model_dump() | backbone | gold | _files(model, function, *_paths(recipe.ppo), *sources)
    if before and rounds.start == "previous":
        settings |= {"reference": rounds.reference}
    continued = policy_before if rounds.start == "previous" else {}
    policy = add("ppo", f"{folder}/ppo", settings, **start, reward=reward, **continued)
    settings = recipe.evaluate.model_dump() | backbone | sampling | _engine(recipe) | _files(model, function)
    first = {"first_evaluation": before["first_evaluation"]} if before else {}
    evaluation = add("evaluate", f"{folder}/evaluate", settings, **start, reward=reward, policy=policy, **first)
    older = {"older_evaluation": before["latest_evaluation"]} if before else {}
    return {
        "reward": reward,
        "policy": policy,
        "first_evaluation": first.get("first_evaluation", evaluation),
        "latest_evaluation": evaluation,
        **label,
        **look,
        **older,
    }


def _labels(
    recipe: Recipe, number: int, start: dict[str, Stage], before: dict[str, Stage], add: Add
) -> tuple[dict[str, Stage], dict[str, Stage], dict[str, Stage]]:
    """Add what a round labels, as far as it labels anything; arguments as of `_round`.

    Returns:
        `sample`, `label` and `second_look`, each by its role, or nothing where there is no such stage.
    """
    folder, config, rounds = f"round-{number}", recipe.reward, recipe.rounds
    model, function = None if "sft" in start else recipe.backbone.model, recipe.evaluate.gold
    backbone, gold = _backbone(recipe, start), _gold(recipe)

    # 1. Answers of the latest policy, where they are labelled or where MetaRM ascends on them.
    labels_answers = rounds.labels_from != "dataset" and (number > 1 or rounds.first == "sampled")
    samples_for_meta = config.meta and config.meta_samples is None
    policy_before = {"policy": before["policy"]} if before else {}
    sample: dict[str, Stage] = {}
    if labels_answers or samples_for_meta:
        size = {"prompts": config.meta_pool, "responses": config.meta_responses}
        if labels_answers:
            size = rounds.sampling()
        settings = {**size, **backbone, **_sampling(recipe), **_engine(recipe), **_files(model)}
        sample = {"sample": add("sample", f"{folder}/sample", settings, **start, **policy_before)}

    # 2. Their labels, joined with those of the rounds before; what is trained on them reads them as a second look left them.
    label: dict[str, Stage] = {}
    look: dict[str, Stage] = {}
    if labels_answers:
        known = {"reward": before["reward"]} if before else {}
        if "label" in before:
            known["label"] = before.get("second_look", before["label"])
        select = add("select", f"{folder}/select", rounds.selection(), **start, **sample, **known)
        lab = (
            {}
            if recipe.lab is None
            else recipe.lab.model_dump(include={"annotators", "flip_rate", "critic_error_rate"})
        )
        earlier = {"earlier": before["label"]} if "label" in before else {}
        annotator = rounds.judge_model if rounds.labels_from == "verdicts" else None
        settings = rounds.labelling() | {"round": number} | lab | gold | _files(function, annotator)
        label = {"label": add("label", f"{folder}/label", settings, **start, select=select, **earlier)}
        if rounds.second_look is not None:
            earlier = {"earlier": before["second_look"]} if "second_look" in before else {}
            asking = {"labels_from": rounds.labels_from, "looked_at": rounds.looked_at}
            voting = recipe.vote.model_dump() | recipe.vote_settings()
            settings = (
                asking | voting | backbone | gold | _files(model, function, *_paths(config), *_paths(recipe.vote))
            )
            look = {"second_look": add("second_look", f"{folder}/second_look", settings, **start, **label, **earlier)}
    elif rounds.labels_from == "dataset" and rounds.count > 1:
        settings = rounds.labelling() | {"round": number, "of": rounds.count} | gold | _files(function)
        label = {"label": add("label", f"{folder}/label", settings, **start)}
    return sample, label, look


def _backbone(recipe: Recipe, start: dict[str, Stage]) -> dict[str, Any]:
    """Return the backbone where a round begins from it; otherwise SFT depends on it."""
    return {} if "sft" in start else {"backbone": recipe.backbone.named()}


def _sampling(recipe: Recipe) -> dict[str, Any]:
    """Return what answers that are sampled outside PPO depend on; what is as it always was is not named, so that keys stay."""
    temperature, key = recipe.sampling.temperature, "max_prompt_length"
    # Of this key a run's own recipe shows every change but that between null, prompts of any length, and the default.
    whole = {key: None} if recipe.ppo.trl_settings().get(key, 0) is None else {}
    return _shown(recipe) | whole | ({} if temperature == 1 else {"temperature": temperature})


def _shown(recipe: Recipe) -> dict[str, Any]:
    """Return what the answers depend on that SFT shows."""
    return {"max_completion_length": recipe.ppo.trl_settings().get("max_completion_length")}


def _engine(recipe: Recipe) -> dict[str, Any]:
    """Return what samples, where it is not transformers."""
    return {} if recipe.sampling.engine == "transformers" else {"engine": recipe.sampling.engine}


def _gold(recipe: Recipe) -> dict[str, Any]:
    """Return what facts about the true reward depend on."""
    return {"gold": recipe.evaluate.gold}


def _files(*names: str | None) -> dict[str, dict[str, str]]:
    """Return the digests of the code files and local models that a stage reads by these names, if there are any."""
    digests = named_digests(names)
    return {"files": digests} if digests else {}


def _paths(section: StageSection) -> list[str]:
    """Return the files that TRL's keys of a section name."""
    values = (section.trl_settings().get(key) for key in PATH_KEYS)
    return [value for value in values if isinstance(value, str)]


def _local_digests(recipe: Recipe) -> dict[str, str]:
    """Return the sha256 of every local data file, by which a changed file makes another data stage."""
    entries = [entry for name in DATA_SOURCES for entry in recipe.data.sources(name)]
    files = {
        entry.source if path == Path(entry.source).expanduser() else str(path): path
        for entry in entries
        if is_local(entry.source)
        for path in local_files(entry.source)
    }
    return {name: known_digest(files[name]) for name in sorted(files)}

"""Every stage of a recipe on one page: in which round, with which settings, from which parents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.data.read import is_local
from rlhf.errors import UserError
from rlhf.files import file_digest
from rlhf.pipeline.store import Stage
from rlhf.recipe.schema import DATA_SOURCES, Recipe

Add = Callable[..., Stage]


def plan(recipe: Recipe) -> list[Stage]:
    """Every stage of a recipe in order. Keys follow from settings alone, so nothing has to run to know what is done."""
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
    """The stages up to the first of a name, or that of a folder ("round-2/label").

    Raises:
        UserError: there is none.
    """
    if until is None:
        return stages
    for number, stage in enumerate(stages, start=1):
        if until in (stage.name, stage.folder):
            return stages[:number]
    raise UserError(f"--until {until}: this recipe has the stages {', '.join(stage.folder for stage in stages)}.")


def _start(recipe: Recipe, add: Add) -> dict[str, Stage]:
    """Round 0: data, base model, SFT. Returns `data`, and `sft` where there is one."""
    origins: dict[str, Stage] = {}
    if recipe.lab is not None:
        origins["lab"] = add("lab", "round-0/lab", recipe.lab.model_dump())
    data_settings = recipe.data.model_dump(exclude_none=True) | {"sha256": _local_digests(recipe)}
    data = add("data", "round-0/data", data_settings, **origins)
    backbone = recipe.backbone.model_dump(exclude_none=True)
    if recipe.backbone.from_scratch is not None:
        origins = {"base": add("base", "round-0/base", backbone, data=data)}
    elif recipe.backbone.model is not None:
        origins = {}
    if recipe.lab is None and recipe.data.sft is None:
        return {"data": data}  # the backbone can answer already, and takes SFT's place
    settings = recipe.sft.model_dump() | {"backbone": backbone} | _sampling(recipe) | _gold(recipe)
    return {"data": data, "sft": add("sft", "round-0/sft", settings, data=data, **origins)}


def _round(
    recipe: Recipe, number: int, start: dict[str, Stage], before: dict[str, Stage], add: Add
) -> dict[str, Stage]:
    """One round: labels, vote, reward model, PPO, judgement.

    Returns:
        what the next round reads: `label`, `reward`, `policy`, and three judgements: `judged`, the first round's; `latest`, this
        one's; `older`, that of the round before.
    """
    folder, how, rounds = f"round-{number}", recipe.reward, recipe.rounds
    own = {} if "sft" in start else {"backbone": recipe.backbone.model_dump(exclude_none=True)}
    sampling, gold = _sampling(recipe), _gold(recipe)

    # 1. Answers of the present policy, where they are labelled or where MetaRM climbs on them.
    labels_answers = rounds.labels_from != "dataset" and (number > 1 or rounds.first == "sampled")
    climbs = how.meta and how.meta_samples is None
    present = {"policy": before["policy"]} if before else {}
    sample: dict[str, Stage] = {}
    if labels_answers or climbs:
        size = {"prompts": how.meta_pool, "responses": how.meta_responses}
        if labels_answers:
            size = rounds.sampling()
        sample = {"sample": add("sample", f"{folder}/sample", {**size, **own, **sampling}, **start, **present)}

    # 2. Their labels, pooled with those of the rounds before.
    pool: dict[str, Stage] = {}
    if labels_answers:
        known = {role: before[role] for role in ("reward", "label") if role in before}
        select = add("select", f"{folder}/select", rounds.selection(), **start, **sample, **known)
        lab = {} if recipe.lab is None else recipe.lab.model_dump(include={"annotators", "flip_rate"})
        earlier = {"earlier": before["label"]} if "label" in before else {}
        settings = rounds.labelling() | {"round": number} | lab | gold
        pool = {"label": add("label", f"{folder}/label", settings, **start, select=select, **earlier)}
    elif rounds.labels_from == "dataset" and rounds.count > 1:
        settings = rounds.labelling() | {"round": number, "of": rounds.count} | gold
        pool = {"label": add("label", f"{folder}/label", settings, **start)}

    # 3. Vote, reward model, PPO, judgement.
    votes: dict[str, Stage] = {}
    if how.needs_vote:
        shape = recipe.vote.model_dump() | recipe.vote_settings()
        votes = {"vote": add("vote", f"{folder}/vote", shape | own | gold, **start, **pool)}
    settings = how.model_dump() | own | sampling | gold
    if how.meta and not climbs:
        settings["meta_sha256"] = file_digest(Path(str(how.meta_samples)).expanduser())
    looks_back: dict[str, Stage] = {
        role: before[role] for role in ("latest_evaluation", "older_evaluation") if role in before
    }
    read = {**pool, **votes, **(sample if climbs else {}), **looks_back}
    reward = add("reward", f"{folder}/reward", settings, **start, **read)
    settings = recipe.ppo.model_dump() | own | gold
    if before and rounds.start == "previous":
        settings |= {"reference": rounds.reference}
    goes_on = present if rounds.start == "previous" else {}
    ppo = add("ppo", f"{folder}/ppo", settings, **start, reward=reward, **goes_on)
    settings = recipe.evaluate.model_dump() | own | sampling
    first = (
        {"first_evaluation": before["first_evaluation"]} if before else {}
    )  # whose answers of SFT are not sampled again
    judged = add("evaluate", f"{folder}/evaluate", settings, **start, reward=reward, policy=ppo, **first)
    found: dict[str, Stage] = {
        "reward": reward,
        "policy": ppo,
        "first_evaluation": first.get("first_evaluation", judged),
        "latest_evaluation": judged,
        **pool,
    }
    if before:
        found["older_evaluation"] = before["latest_evaluation"]
    return found


def _sampling(recipe: Recipe) -> dict[str, Any]:
    return {"max_completion_length": recipe.ppo.trl_settings().get("max_completion_length")}


def _gold(recipe: Recipe) -> dict[str, Any]:
    return {"gold": recipe.evaluate.gold}


def _local_digests(recipe: Recipe) -> dict[str, str]:
    """sha256 of every local data file: a changed file is another data stage."""
    files = {entry.source for name in DATA_SOURCES for entry in recipe.data.sources(name) if is_local(entry.source)}
    return {file: file_digest(Path(file).expanduser()) for file in sorted(files) if Path(file).expanduser().is_file()}

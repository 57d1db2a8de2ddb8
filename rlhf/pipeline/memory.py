"""What to do when a stage has run out of memory, in one sentence: the batch it was at, and the keys to change."""

from pathlib import Path

from rlhf.pipeline.store import Stage
from rlhf.recipe.schema import Recipe

BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
DEFAULT_BATCH, DEFAULT_ACCUMULATION = 8, 1  # the Trainer's
PARTS, DEFAULT_PARTS, TOGETHER = "num_mini_batches", 1, "generation_batch_size"  # PPOConfig's
# What else takes memory, by section.
LENGTHS = {"sft": "max_length", "vote": "max_length", "reward": "max_length", "ppo": "max_completion_length"}


def memory_sentence(stage: Stage, recipe: Recipe, root: Path, error: BaseException) -> str:
    """Return what to do about too little memory: the same steps in halves, where the stage trains.

    Args:
        root: the run's folder.
        error: its first line is quoted, and its notes say what the stage was at.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    at = " ".join(getattr(error, "__notes__", ()))
    place = "on the accelerator" if type(error).__name__ == "OutOfMemoryError" else "on this machine"
    begin = f"{stage.folder}: out of memory {place}{at} ({lines[0][:200]}). Finished stages and whole checkpoints are intact."
    if stage.name not in LENGTHS:
        return f"{begin} Free memory that other processes hold, and the same command goes on."
    settings = recipe.vote_settings() if stage.name == "vote" else getattr(recipe, stage.name).trl_settings()
    batch, steps = settings.get(BATCH, DEFAULT_BATCH), settings.get(ACCUMULATION, DEFAULT_ACCUMULATION)
    if batch == 1:
        longest = f"{stage.name}.{LENGTHS[stage.name]}"
        change = f"{stage.name}.{BATCH} is 1 already: lower {longest}, or train LoRA ({stage.name}.use_peft)"
    else:
        half = -(-batch // 2)
        same = ", the same steps in halves" if batch % 2 == 0 else ""
        change = (
            f"Set {stage.name}.{BATCH}={half} {stage.name}.{ACCUMULATION}={2 * steps} ({batch} and {steps} now{same})"
        )
    if stage.name == "ppo":
        answers = batch * steps * settings.get(PARTS, DEFAULT_PARTS)
        together = min(answers, settings.get(TOGETHER) or answers)
        if together > 1:
            change += f", or, where it was sampling, {together} answers at once, ppo.{TOGETHER}={-(-together // 2)}"
    old = f"{root}/recipe.yaml and {root}/{stage.folder}"
    return f"{begin} {change}, delete {old}, which hold the old numbers, and give the command again; what was done is kept."

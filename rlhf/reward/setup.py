"""What is put right, or refused, before TRL builds a reward trainer: tokenizer, adapter, head."""

from peft import PeftConfig, PeftModel, TaskType
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig

from rlhf.errors import UserError
from rlhf.models.open import open_tokenizer
from rlhf.models.text import adopt_encoder_tokens, check_tokenizer

HEADS = ("score", "classifier", "classification_head")  # what transformers calls the layers that a classifier adds
ADVICE = "give LoraConfig task_type='SEQ_CLS', or modules_to_save with the head's name"


def tokenizer_of(
    model: str | PreTrainedModel | PeftModel, args: RewardConfig, given: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a reward model trains with, with a padding token that ends no text.

    transformers reads a decoder's score at the last token that is no padding. Where the end token pads, as TRL has it for a
    tokenizer without a padding token, training would read the token before it, and whoever scores the end token.

    Args:
        given: by the caller; without one it is the model's own.

    Raises:
        UserError: as `check_tokenizer` says; or `args.pad_token` is the end token.
    """
    tokenizer = given
    if tokenizer is None:
        tokenizer = open_tokenizer(model if isinstance(model, str) else model.config._name_or_path)
    adopt_encoder_tokens(tokenizer)
    if args.eos_token is not None and args.eos_token in tokenizer.get_vocab():  # TRL refuses others
        tokenizer.eos_token = args.eos_token
    if args.pad_token is not None and args.pad_token == tokenizer.eos_token:
        raise UserError(
            f"reward: pad_token is the end token {args.pad_token!r}, so the score would be read before it; leave pad_token out."
        )
    check_tokenizer(tokenizer, conversational=False, name="reward")
    return tokenizer


def check_task(peft_config: PeftConfig | None) -> None:
    """Refuse an adapter for another task than that of a classifier, which PEFT would not put on one.

    Raises:
        UserError: with the task.
    """
    task = getattr(peft_config, "task_type", None)
    if task not in (None, TaskType.SEQ_CLS):
        raise UserError(
            f"reward: the adapter's task_type is {task.value if isinstance(task, TaskType) else task!s}; {ADVICE}."
        )


def check_head(model: nn.Module) -> None:
    """Refuse an adapter that leaves the head as it was drawn, at random, so that scores would say nothing.

    Raises:
        UserError: no weight of the head is trained.
    """
    if not isinstance(model, PeftModel):
        return
    heads = [(name, weight) for name, weight in model.named_parameters() if _is_of_head(name)]
    if heads and not any(weight.requires_grad for _, weight in heads):
        raise UserError(f"reward: the adapter does not train the head, which was drawn at random; {ADVICE}.")


def _is_of_head(name: str) -> bool:
    return any(part in HEADS for part in name.split("."))

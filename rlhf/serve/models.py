"""The models that a server scores with: opened by name; each text is encoded for every member of its model."""

import logging
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import TemplateError

from rlhf.data.rows import Prompt
from rlhf.errors import TrainingError, UserError
from rlhf.reward.ensemble import member_folders
from rlhf.reward.load import CARD, load_reward_model, open_reward_model
from rlhf.reward.model import RewardModel

log = logging.getLogger("rlhf.serve")
# A CPU is busy with a thousand tokens, and more of them leave its cache; a GPU wants as many as there are.
TOKENS_ON_CPU, TOKENS_ON_GPU = 1024, 16_384
# What tokenizers and chat templates raise at texts that they can't take.
REFUSALS = (TemplateError, UserError, TrainingError, ValueError, TypeError, LookupError, RuntimeError, OverflowError)


class Answer(NamedTuple):
    """An answer with its prompt; the reward model's own template is laid around the two."""

    prompt: Prompt
    response: str
    ended: bool = True


class Rendered(NamedTuple):
    """A text that holds prompt and answer, as a chat template has rendered them."""

    text: str
    ended: bool = True


class Ids(NamedTuple):
    """Token ids, scored as they are."""

    ids: list[int]


Text = Answer | Rendered | Ids


class Encoded(NamedTuple):
    """A text as it is scored: a row of token ids for each member of the model.

    `tokens` is the length of the longest row; `is_cut` tells whether the text lost its beginning.
    """

    rows: list[list[int]]
    tokens: int
    is_cut: bool


class ServedModel:
    """A reward model, experts, gated attributes, or the members of an ensemble, under the name that requests give.

    Attributes:
        name: in requests.
        members: one model, or all of an ensemble; the score of an ensemble is the mean over its members, each counted
            from its own mean on SFT samples.
        mean, std: of scores on SFT samples; None where nobody measured them: for a model that was trained elsewhere, and the
            deviation of an ensemble's scores.
        label: what the model's configuration calls its only score.
    """

    def __init__(self, name: str, members: Sequence[RewardModel], *, has_scale: bool = True):
        self.name, self.members = name, list(members)
        is_single = len(self.members) == 1
        self.mean = None if not has_scale else self.members[0].mean if is_single else 0.0
        self.std = self.members[0].std if has_scale and is_single else None
        labels = getattr(self.members[0].model.config, "id2label", None) or {}
        self.label: str | None = labels.get(0)

    @property
    def kind(self) -> str:
        """Return what lies in the folder: "reward model", "experts", "gated" or "ensemble"."""
        return "ensemble" if len(self.members) > 1 else self.members[0].kind

    @property
    def batch_tokens(self) -> int:
        """Return how many tokens a forward should have."""
        is_on_cpu = next(self.members[0].model.parameters()).device.type == "cpu"
        return TOKENS_ON_CPU if is_on_cpu else TOKENS_ON_GPU

    @property
    def max_length(self) -> int:
        """Return how many tokens every member can read."""
        return min(member.max_length for member in self.members)

    def reads_as_rendered(self, prompt: Prompt) -> bool:
        """Tell whether a prompt is a text that a chat template has rendered, or the model reads plain text anyway."""
        first = self.members[0]
        return not first.conversational or (isinstance(prompt, str) and first.is_rendered(prompt))

    def end_token(self) -> str:
        """Return the text of the token that closes an answer."""
        return str(self.members[0].tokenizer.eos_token)

    def encode(self, texts: Sequence[Text]) -> list[Encoded | str]:
        """Return each text as it is scored, or in a sentence why it can't be; where one fails, all are tried one by one."""
        counts = [member.counts() for member in self.members]
        cut_before = [member.cut for member in self.members]
        try:
            rows = [self._rows(member, texts) for member in self.members]
        except Exception as error:  # a chat template may raise anything
            if len(texts) == 1:
                return [_refusal(error)]
            rows = []
        is_cut = any(member.cut > before for member, before in zip(self.members, cut_before, strict=True))
        if len(texts) > 1 and (is_cut or not rows):  # which of them?
            for member, count in zip(self.members, counts, strict=True):
                member.count_from(count)
            return [self.encode([text])[0] for text in texts]
        each = zip(*rows, strict=True)
        return [Encoded(list(of_text), max(map(len, of_text)), is_cut) for of_text in each]

    def score(self, texts: Sequence[Text], encoded: Sequence[Encoded]) -> list[float]:
        """Return the scores of texts that were encoded."""
        first = self.members[0]
        if first.reads_prompt_apart:  # the prompt decides how much each expert or attribute counts
            answers = [text for text in texts if isinstance(text, Answer)]
            ended = [answer.ended for answer in answers]
            return first.score([x.prompt for x in answers], [x.response for x in answers], ended=ended).tolist()
        each = [member.score_rows([row.rows[i] for row in encoded]) for i, member in enumerate(self.members)]
        if len(each) == 1:
            return each[0].tolist()
        centred = [scores - member.mean for scores, member in zip(each, self.members, strict=True)]
        return torch.stack(centred).mean(dim=0).tolist()

    def _rows(self, member: RewardModel, texts: Sequence[Text]) -> list[list[int]]:
        """Return a member's token rows of texts of any kind, in their order."""
        answers = [(i, text) for i, text in enumerate(texts) if isinstance(text, Answer)]
        rendered = [(i, text) for i, text in enumerate(texts) if isinstance(text, Rendered)]
        rows = {i: self._checked(member, text.ids) for i, text in enumerate(texts) if isinstance(text, Ids)}
        if answers:
            prompts, responses = [x.prompt for _, x in answers], [x.response for _, x in answers]
            encoded = member.encode(prompts, responses, [x.ended for _, x in answers])
            rows.update(zip([i for i, _ in answers], encoded, strict=True))
        if rendered:
            if member.reads_prompt_apart:
                raise UserError(f"{member.kind}: prompt and answer must come apart; send `prompts` and `responses`.")
            encoded = member.encode_texts([x.text for _, x in rendered], [x.ended for _, x in rendered])
            rows.update(zip([i for i, _ in rendered], encoded, strict=True))
        return [rows[i] for i in range(len(texts))]

    def _checked(self, member: RewardModel, ids: list[int]) -> list[int]:
        """Return token ids as they are.

        Raises:
            UserError: not ids of this model, or more than it reads.
        """
        if self.kind != "reward model":
            raise UserError(f"token ids can't be scored by {self.kind}; send texts.")
        size = member.model.config.get_text_config().vocab_size
        if not ids or len(ids) > member.max_length or not all(0 <= x < size for x in ids):
            raise UserError(f"send 1 to {member.max_length} token ids, each at least 0 and less than {size}.")
        return ids


def _refusal(error: Exception) -> str:
    if isinstance(error, TemplateError):
        return f"the chat template refuses these turns: {error}"
    if not isinstance(error, REFUSALS):
        # The message may hold a person's text; the lines of code do not.
        log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        return f"can't be read ({type(error).__name__})"
    return f"can't be scored: {str(error) or type(error).__name__}".splitlines()[0]


def open_models(names: Sequence[str]) -> list[ServedModel]:
    """Open what `rlhf serve` names.

    Args:
        names: folders of reward models or experts, reward stages with the members of an ensemble, or hub ids; each may be
            given another name in requests, `NAME=FOLDER`.

    Raises:
        UserError: two of one name; nothing there that could score.
    """
    places = [_split_name(name) for name in names]
    twice = sorted({name for name, _ in places if sum(other == name for other, _ in places) > 1})
    if twice:
        raise UserError(f"serve: several models are called {', '.join(twice)}; give them names, NAME=FOLDER.")
    return [_open_model(name, folder) for name, folder in places]


def _split_name(argument: str) -> tuple[str, str]:
    name, sign, folder = argument.partition("=")
    return (name, folder) if sign and name and folder and not Path(argument).exists() else (argument, argument)


def _open_model(name: str, folder: str) -> ServedModel:
    members = member_folders(Path(folder).expanduser())
    if (members[0] / CARD).is_file():
        return ServedModel(name, [load_reward_model(member) for member in members])
    return ServedModel(name, [open_reward_model(folder)], has_scale=(Path(folder).expanduser() / CARD).is_file())

"""What clients send and what they get: the bodies of requests and replies, and the texts in them."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NotRequired, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, StrictInt, Tag
from typing_extensions import TypedDict

from rlhf.data.rows import Messages, Prompt
from rlhf.serve.batching import Refused
from rlhf.serve.models import Answer, Ids, Rendered, ServedModel, Text

MOST_TEXTS = 32_768  # in a request
MOST_CHARACTERS = 200_000  # in one text, turn or answer
MOST_TURNS = 1_000

Item = TypeVar("Item")
Words = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Many = Annotated[list[Item], Field(max_length=MOST_TEXTS)]


class Turn(TypedDict):
    """One turn of a conversation."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]  # pydantic's way to configure a TypedDict

    role: Literal["system", "user", "assistant"]
    content: Words
    ended: NotRequired[StrictBool | None]


def _kind_of_prompt(value: object) -> str:
    return "text" if isinstance(value, str) else "conversation"


Conversation = Annotated[list[Turn], Field(min_length=1, max_length=MOST_TURNS)]
Asked = Annotated[
    Annotated[Words, Tag("text")] | Annotated[Conversation, Tag("conversation")], Discriminator(_kind_of_prompt)
]
ModelName = Annotated[str | None, Field(description="One of GET /models; the first one if missing.")]
Ended = Annotated[Many[StrictBool] | None, Field(description="False for an answer that was cut off.")]


class ScoreBody(BaseModel):
    """Answers to score: whole conversations as `messages`, or `prompts` with `responses`."""

    model_config = ConfigDict(extra="forbid")
    model: ModelName = None
    messages: Annotated[
        Many[Conversation] | None, Field(description="Conversations; the last turn of each is the answer.")
    ] = None
    prompts: Many[Asked] | None = None
    responses: Many[Words] | None = None
    ended: Ended = None

    def texts(self) -> list[Text]:
        """Return the texts to score.

        Raises:
            Refused: 422, with a sentence, where lengths differ or a conversation ends without an answer.
        """
        if self.messages is not None:
            if self.prompts is not None or self.responses is not None:
                raise Refused(422, "send either `messages`, whole conversations, or `prompts` and `responses`.")
            flags = _ended(self.ended, len(self.messages))
            return [_whole(turns, i, ended) for i, (turns, ended) in enumerate(zip(self.messages, flags, strict=True))]
        if self.prompts is None or self.responses is None:
            raise Refused(422, "send `messages`, or `prompts` and `responses`.")
        return _answers(self.prompts, self.responses, self.ended)


class RankBody(BaseModel):
    """Several answers to one prompt, to be put in order."""

    model_config = ConfigDict(extra="forbid")
    model: ModelName = None
    prompt: Asked
    responses: Annotated[Many[Words], Field(min_length=1)]
    ended: Ended = None

    def texts(self) -> list[Text]:
        """Return the texts to score.

        Raises:
            Refused: 422, with a sentence, where lengths differ.
        """
        return _answers([self.prompt] * len(self.responses), self.responses, self.ended)


class RewardBody(BaseModel):
    """Answers to score, in one of two forms; what OpenRLHF's clients send beside them (`labels`) is not looked at.

    Ours: `prompts` (strings, or conversations) with `responses`, and `ended` where some answers were cut off; a client that
    must keep `prompts` to texts, for other servers, sends conversations as `messages`, which count then. OpenRLHF's: `query` =
    prompt and answer in one text, with `prompts` beside them or not.
    """

    model_config = ConfigDict(extra="allow")
    model: ModelName = None
    prompts: Many[Asked] | None = None
    messages: Many[Asked] | None = None
    responses: Many[Words] | None = None
    ended: Ended = None
    query: Many[Words] | None = None

    def texts(self, model: ServedModel) -> list[Text]:
        """Return the texts to score.

        A `query` is scored as that very text where its prompt was rendered by a chat template, where it comes without one, or
        where the reward model reads plain text. Otherwise its prompt is a person's words, and the reward model's own template
        is laid around the two.

        Raises:
            Refused: 422, with a sentence, where there are none of either form, lengths differ, a query does not begin with its
                prompt, or a field is all but called like one of ours.
        """
        _refuse_misspelt(self)
        answers = self.query if self.responses is None else self.responses
        if answers is None or (self.responses is not None and self.prompts is None and self.messages is None):
            raise Refused(422, "send `prompts` and `responses`, or `query`.")
        if self.prompts is not None and len(answers) != len(self.prompts):
            raise Refused(422, f"{len(self.prompts)} prompts and {len(answers)} answers.")
        if self.messages is not None and len(answers) != len(self.messages):
            raise Refused(422, f"{len(self.messages)} values of `messages` and {len(answers)} answers.")
        if self.responses is not None:
            prompts = self.prompts if self.messages is None else self.messages
            return _answers(cast(list[Prompt], prompts), self.responses, self.ended)
        flags = _ended(self.ended, len(answers))
        if self.prompts is None:
            return [Rendered(query, ended) for query, ended in zip(answers, flags, strict=True)]
        are_rendered = [model.reads_as_rendered(cast(Prompt, prompt)) for prompt in self.prompts]
        if all(are_rendered):
            return [Rendered(query, ended) for query, ended in zip(answers, flags, strict=True)]
        texts: list[Text] = []
        for row, (query, prompt, ended) in enumerate(zip(answers, self.prompts, flags, strict=True)):
            if not isinstance(prompt, str) or not query.startswith(prompt):
                raise Refused(422, f"query {row} does not begin with its prompt; send `responses` instead.")
            if are_rendered[row]:
                raise Refused(422, f"prompt {row} was rendered by a chat template and others were not; send one kind.")
            response = query[len(prompt) :].removeprefix("\n").removesuffix(model.end_token())
            texts.append(Answer(prompt, response, ended))
        return texts


Row = Annotated[list[StrictInt], Field(max_length=MOST_CHARACTERS)]


def _kind_of_input(value: object) -> str:
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else ""
    return "ids" if isinstance(first, int) else "rows of ids" if isinstance(first, list) else "texts"


Input = Annotated[
    Annotated[Words, Tag("text")]
    | Annotated[Many[Words], Tag("texts")]
    | Annotated[Row, Tag("ids")]
    | Annotated[Many[Row], Tag("rows of ids")],
    Discriminator(_kind_of_input),
]


class ClassifyBody(BaseModel):
    """What vLLM's clients send to `/classify`: `input`, rendered texts or token ids, or one conversation as `messages`.

    `ended` is of this server alone: whether each text came to its end; all did where it is missing, and get their end token.
    """

    model_config = ConfigDict(extra="allow")
    model: ModelName = None
    input: Input | None = None
    messages: Conversation | None = None
    ended: Many[StrictBool] | None = None
    truncate_prompt_tokens: int | None = None
    use_activation: StrictBool | None = None
    activation: StrictBool | None = None
    add_generation_prompt: StrictBool = False
    continue_final_message: StrictBool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    softmax: StrictBool | None = None
    normalize: StrictBool | None = None

    def texts(self) -> list[Text]:
        """Return the texts to score.

        Raises:
            Refused: 422, with a sentence: neither or both of the two, a wish that would change the score, or a field that is all
                but called like one of ours.
        """
        _refuse_misspelt(self)
        for wish in (
            "truncate_prompt_tokens",
            "use_activation",
            "activation",
            "add_generation_prompt",
            "continue_final_message",
            "chat_template",
            "chat_template_kwargs",
            "softmax",
            "normalize",
        ):
            if getattr(self, wish):
                raise Refused(422, f"`{wish}` is not offered here: a text has one score, raw, of the saved template.")
        if (self.input is None) == (self.messages is None):
            raise Refused(422, "send either `input` or `messages`.")
        if self.messages is not None:
            return [_whole(self.messages, 0, _ended(self.ended, 1)[0])]
        if isinstance(self.input, str):
            return [Rendered(self.input, _ended(self.ended, 1)[0])]
        rows: list[Any] = list(self.input or [])
        if rows and isinstance(rows[0], str):
            return [Rendered(row, ended) for row, ended in zip(rows, _ended(self.ended, len(rows)), strict=True)]
        if self.ended is not None:
            raise Refused(422, "token ids are scored as they are; leave out `ended`.")
        return [Ids(rows)] if rows and isinstance(rows[0], int) else [Ids(row) for row in rows]


def _refuse_misspelt(body: RewardBody | ClassifyBody) -> None:
    """Refuse fields that are all but called like one of ours; others are other servers' own, and change no score."""
    for name in body.model_extra or {}:
        meant = get_close_matches(name, type(body).model_fields, n=1, cutoff=0.75)
        if meant:
            raise Refused(422, f"unknown field `{name}`; did you mean `{meant[0]}`?")


def _answers(prompts: Sequence[Any], responses: Sequence[str], ended: Sequence[bool] | None) -> list[Text]:
    if len(prompts) != len(responses):
        raise Refused(422, f"{len(prompts)} prompts and {len(responses)} answers.")
    flags = _ended(ended, len(responses))
    return [Answer(*answer) for answer in zip(prompts, responses, flags, strict=True)]


def _ended(ended: Sequence[bool] | None, count: int) -> Sequence[bool]:
    if ended is not None and len(ended) != count:
        raise Refused(422, f"{count} answers and {len(ended)} values of `ended`.")
    return [True] * count if ended is None else ended


def _whole(turns: Sequence[Turn], row: int, ended: bool) -> Answer:
    """Split a conversation into prompt and answer."""
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise Refused(422, f"conversation {row} must end with an assistant's answer to something.")
    is_whole = ended and turns[-1].get("ended") is not False
    return Answer(cast(Messages, list(turns[:-1])), turns[-1]["content"], is_whole)


class ScoreReply(BaseModel):
    """Raw scores in the order sent; `cut` texts were too long for the model and lost their beginning."""

    model: str
    scores: list[float]
    cut: int
    tokens: int


class RankReply(ScoreReply):
    """`order` has the numbers of the answers, best first, ties in the order sent; `scores` are in the order sent."""

    order: list[int]


class RewardReply(BaseModel):
    """OpenRLHF's reply: raw scores under both of the names that its versions read."""

    rewards: list[float]
    scores: list[float]
    cut: int


class Class(BaseModel):
    """One text's entry in vLLM's reply; `probs` holds the raw score alone: no sigmoid, no softmax."""

    index: int
    label: str | None
    probs: list[float]
    num_classes: int = 1


class Usage(BaseModel):
    """Tokens, as vLLM counts them."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class ClassifyReply(BaseModel):
    """vLLM's reply to `/classify`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Class]
    usage: Usage


class HealthReply(BaseModel):
    """Whether the server works; of which model, if the asker may know."""

    status: Literal["ok"] = "ok"
    model: str | None = None
    mean: float | None = None
    std: float | None = None
    models: list[str] | None = None


class ModelEntry(BaseModel):
    """One model; `mean` and `std` are those of its scores on SFT samples, null where nobody measured them."""

    id: str
    object: Literal["model"] = "model"
    kind: Literal["reward model", "experts", "gated", "ensemble"]
    mean: float | None
    std: float | None
    max_length: int


class ModelsReply(BaseModel):
    """The models of a server."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Problem(BaseModel):
    """Every error: one sentence, and the id under which the server's log has the request."""

    detail: str
    request_id: str

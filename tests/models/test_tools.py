"""Tool calls become the text that the model's template writes for them, to the last character, or are refused by name."""

import copy
from typing import Any

import pytest

from rlhf.data.read import BadRow
from rlhf.data.rows import answer, asked
from rlhf.models.text import answer_text, prompt_text
from rlhf.models.tools import ToolTemplate

TEMPLATE = """{%- for m in messages -%}{%- if m.role == 'tool' -%}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% else -%}<|im_start|>{{ m.role }}
{{ m.content or '' }}{%- if m.tool_calls -%}{%- for c in m.tool_calls -%}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{%- endfor -%}{%- endif -%}{{ eos_token }}
{% endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


ROW: dict[str, Any] = {
    "prompt": [
        {"role": "user", "content": "in Rome?"},
        call(city="Rome"),
        {"role": "tool", "content": "42", "name": "weather"},
    ],
    "chosen": [call(city="Rome", days=[1, 2])],
    "rejected": [{"role": "assistant", "content": "no idea"}],
}


@pytest.fixture
def with_tools(tokenizer: Any) -> Any:
    changed = copy.copy(tokenizer)
    changed.chat_template = TEMPLATE
    return changed


def test_a_model_reads_what_its_template_writes(with_tools: Any) -> None:
    """The reference is the template on the rows as they were, by transformers alone."""
    fitted = ToolTemplate(lambda: with_tools, "m")(ROW)
    expected = with_tools.apply_chat_template(ROW["prompt"], tokenize=False, add_generation_prompt=True)
    assert prompt_text(with_tools, fitted["prompt"]) == expected
    for side in ("chosen", "rejected"):
        whole = with_tools.apply_chat_template([*ROW["prompt"], *ROW[side]], tokenize=False)
        assert answer_text(with_tools, fitted["prompt"], fitted[side][0]["content"]) == whole
    assert '"days": [1, 2]' in fitted["chosen"][0]["content"]
    turns = [*fitted["prompt"], *fitted["chosen"], *fitted["rejected"]]
    assert all(set(turn) == {"role", "content"} for turn in turns)


def test_a_conversation_that_is_compared_whole_keeps_all_its_turns(with_tools: Any) -> None:
    tool = {"role": "tool", "content": "7", "name": "weather"}
    longer = [call(city="Oslo"), tool, {"role": "assistant", "content": "seven"}]
    fitted: Any = ToolTemplate(lambda: with_tools, "m")({**ROW, "chosen": longer})
    assert [turn["role"] for turn in fitted["chosen"]] == ["assistant", "tool", "assistant"]
    whole = with_tools.apply_chat_template([*ROW["prompt"], *longer], tokenize=False)
    assert answer_text(with_tools, asked(fitted, "chosen"), answer(fitted, "chosen")) == whole


CALLS = TEMPLATE[TEMPLATE.index("{%- if m.tool_calls") : TEMPLATE.index("{{ eos_token }}")]


@pytest.mark.parametrize(
    ("left_out", "reason"),
    [
        (CALLS, "no place for a tool call's arguments and tool calls"),
        ("<tool_response>{{ m.content }}</tool_response>", "no place for a tool's turn"),
        ("{{ c.function.arguments | tojson }}", "no place for a tool call's arguments"),
    ],
)
def test_a_template_without_a_place_is_refused_by_name(with_tools: Any, left_out: str, reason: str) -> None:
    with_tools.chat_template = TEMPLATE.replace(left_out, "")
    with pytest.raises(BadRow, match=f"the chat template of m has {reason}"):
        ToolTemplate(lambda: with_tools, "m")(ROW)


def test_a_template_that_raises_or_trims_is_refused(with_tools: Any) -> None:
    with_tools.chat_template = TEMPLATE.replace("<tool_response>", "{{ raise_exception('no tools here') }}")
    with pytest.raises(BadRow, match=r"refuses its tool calls or tools' turns \(no tools here\)"):
        ToolTemplate(lambda: with_tools, "m")(ROW)
    with_tools.chat_template = TEMPLATE.replace("{{ m.content or '' }}", "{{ (m.content or '') | upper }}")
    with pytest.raises(BadRow, match="can't write its tool calls as the text of a turn"):
        ToolTemplate(lambda: with_tools, "m")({**ROW, "prompt": ROW["prompt"][:1]})


def test_a_special_token_of_the_template_is_no_text(with_tools: Any) -> None:
    """A typed one, in a call's arguments or beside it, is words and stays."""
    token = "[TOOL_CALLS]"
    typed = {**ROW, "chosen": [{**call(city=f"Rome {token}"), "content": f"I call {token}"}]}
    with_special = copy.deepcopy(with_tools)
    with_special.add_special_tokens({"additional_special_tokens": [token]})
    fitted = ToolTemplate(lambda: with_special, "m")(typed)
    assert fitted["chosen"][0]["content"].count(token) == 2
    with_special.chat_template = TEMPLATE.replace("<tool_call>", token)
    for row in (ROW, typed, {**ROW, "prompt": ROW["prompt"][:1]}):
        with pytest.raises(BadRow, match=r"writes the special token '\[TOOL_CALLS\]' in its tool calls"):
            ToolTemplate(lambda: with_special, "m")(row)


@pytest.mark.parametrize("arguments", [["Rome"], 5, "Rome"])
def test_a_call_that_can_not_be_written_is_a_bad_row_and_ends_nothing(with_tools: Any, arguments: Any) -> None:
    """A TypeError of one row ended `rlhf score` before its first line was written."""
    with_tools.chat_template = TEMPLATE.replace("c.function.arguments | tojson", "c.function.arguments.items() | list")
    made = call(city="Rome")
    row = {"prompt": [{"role": "user", "content": "in Rome?"}], "completion": [made]}
    assert "Rome" in ToolTemplate(lambda: with_tools, "m")(row)["completion"][0]["content"]
    made["tool_calls"][0]["function"]["arguments"] = arguments
    with pytest.raises(BadRow, match="the chat template of m"):
        ToolTemplate(lambda: with_tools, "m")(row)

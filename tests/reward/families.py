"""Chat families that people train reward models on, written anew from their formats: a tokenizer of the right class, a template.

Every vocabulary is made on the spot: bytes, no merges, and the special tokens with the identities that the family uses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GemmaTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

VOCABULARY = 320

# A system turn that nobody wrote is written all the same; a newline follows the end token.
CHATML = (
    "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# Today's date, contents trimmed, the begin token written by template and tokenizer both.
LLAMA_3 = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' + date_string "
    "+ '\\n\\n' + system + '<|eot_id|>' }}\n"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content']|trim + '<|eot_id|>' }}"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}\n"
)
# No system turn; a turn ends in a token that is not the end token.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# The instruction's marks are plain text, and so is the blank after the end token.
MISTRAL_1 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
# The marks are tokens; a system turn is written into the last question, and nowhere once that is answered.
MISTRAL_3 = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}{%- for message in loop_messages %}"
    "{%- if message['role'] == 'user' %}{%- if loop.last and system is defined %}"
    "{{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content']|trim + eos_token }}{%- endif %}{%- endfor %}"
)
# No begin token in the template, which the tokenizer writes.
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# An answer's thoughts are left out of the turns before.
DEEPSEEK = (
    "{{ bos_token }}{%- for message in messages %}{%- if message['role'] == 'system' %}{{ message['content'] }}"
    "{%- elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{%- else %}{%- set content = message['content'] %}{%- if '</think>' in content and not loop.last %}"
    "{%- set content = content.split('</think>')[-1] %}{%- endif %}"
    "{{ '<｜Assistant｜>' + content + eos_token }}{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
# Tokens that swallow the white space behind them; the end token comes once, after everything.
PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


class Family(NamedTuple):
    """A tokenizer with its template, and whether the template writes a system turn."""

    tokenizer: Callable[[], Any]
    template: str | None
    system: bool = True

    def build(self) -> Any:
        """Return the tokenizer with the template on it."""
        tokenizer = self.tokenizer()
        if self.template is not None:
            tokenizer.chat_template = self.template
        assert len(tokenizer) <= VOCABULARY
        return tokenizer


def byte_level(special: list[str]) -> Tokenizer:
    """Return a byte-level vocabulary, which has a token for every byte, with special tokens after it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return inner


def sentence_pieces(special: list[str]) -> dict[str, int]:
    """Return a vocabulary as SentencePiece has it: special tokens, bytes, a few letters, and ▁ for a blank."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return {token: i for i, token in enumerate([*special, *bytes_, "▁", *"aeinorst"])}


def qwen() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={letter: i for i, letter in enumerate(letters)},
        merges=[],
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    return tokenizer


def llama_3() -> Any:
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    others = ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|finetune_right_pad_id|>"]
    inner = byte_level([begin, end, *others])
    inner.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, inner.token_to_id(begin))]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=begin, eos_token=end)


def gemma() -> Any:
    vocabulary = sentence_pieces(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"])
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
    tokenizer.add_tokens(
        [AddedToken(x, special=True, normalized=False) for x in ("<start_of_turn>", "<end_of_turn>")],
        special_tokens=True,
    )
    return tokenizer


def llama_2() -> Any:
    """As Mistral's first models and Zephyr have it, with a token to pad with."""
    vocabulary = sentence_pieces(["<unk>", "<s>", "</s>", "<pad>"])
    return LlamaTokenizer(vocab=vocabulary, merges=[], legacy=True, add_bos_token=True, pad_token="<pad>")


def mistral_3() -> Any:
    marks = ["[INST]", "[/INST]", "[control_8]"]
    vocabulary = sentence_pieces(["<unk>", "<s>", "</s>", *marks])
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[], legacy=False, add_bos_token=True, pad_token="[control_8]")
    tokenizer.add_tokens([AddedToken(x, special=True, normalized=False) for x in marks], special_tokens=True)
    return tokenizer


def deepseek() -> Any:
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    inner = byte_level([begin, end, "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>"])
    inner.post_processor = processors.TemplateProcessing(
        f"{begin} $A", special_tokens=[(begin, inner.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=begin, eos_token=end, pad_token="<｜▁pad▁｜>")


def phi_3() -> Any:
    marks = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    names = ["<|endoftext|>", *marks, "<|placeholder1|>"]
    vocabulary = sentence_pieces(["<unk>", "<s>", "</s>", *names])
    tokenizer = LlamaTokenizer(
        vocab=vocabulary,
        merges=[],
        legacy=False,
        add_bos_token=False,
        eos_token="<|endoftext|>",
        pad_token="<|placeholder1|>",
    )
    tokenizer.add_tokens(
        [AddedToken(x, special=True, normalized=False, rstrip=True) for x in marks], special_tokens=True
    )
    return tokenizer


def gpt_2() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return GPT2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], pad_token="<|padding|>")


FAMILIES = {
    "ChatML": Family(qwen, CHATML),
    "Llama 3": Family(llama_3, LLAMA_3),
    "Gemma": Family(gemma, GEMMA, system=False),
    "Mistral v1": Family(llama_2, MISTRAL_1, system=False),
    "Mistral v3": Family(mistral_3, MISTRAL_3, system=False),
    "Zephyr": Family(llama_2, ZEPHYR),
    "DeepSeek": Family(deepseek, DEEPSEEK),
    "Phi": Family(phi_3, PHI_3),
    "transcripts": Family(gpt_2, None),
}

"""Chat templates and tokenizers of the models that the recipes name, written anew from their formats.

`test_stand_ins.py` compares each template with the copy of the original that TRL keeps for recognising it.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

# An answer behind the last question gets its thought, an empty one where it has none; earlier answers lose theirs.
QWEN_3 = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{%- set content, thought = message.content, '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
# ChatML with a system turn that nobody wrote.
QWEN_2_5 = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SMOL_LM_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A date in every system turn (the model's own template asks for today's where it can), contents trimmed.
LLAMA_3_1 = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- set system = '' %}"
    "{%- if messages[0].role == 'system' %}{%- set system, messages = messages[0].content|trim, messages[1:] %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' + date_string "
    "+ '\\n\\n' + system + '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content|trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
# The system turn is written into the first question; a turn ends in a token that is not the end token.
GEMMA_3 = (
    "{{ bos_token }}{%- set lead = '' -%}"
    "{%- if messages[0].role == 'system' -%}{%- set lead, messages = messages[0].content + '\n\n', messages[1:] -%}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Roles must alternate') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + (lead if loop.first else '') }}"
    "{{- message.content | trim }}{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)

VOCABULARY = 400  # words and bytes; special tokens come on top


def byte_level(texts: Sequence[str], special: Sequence[str] = ()) -> Tokenizer:
    """Train a vocabulary as GPT-2, Qwen, Llama 3 and SmolLM have it: words over bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sentence_pieces(texts: Sequence[str], special: Sequence[str]) -> dict[str, Any]:
    """Train a vocabulary and merges as Gemma and Llama 2 have them: ▁ for a blank, and a token for every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # no word crosses a blank
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    size = VOCABULARY + len(names)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator([part for text in texts for part in text.split("\n")], trainer)
    return parts(tokenizer)


def parts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return vocabulary and merges, as the slow-looking classes of transformers take them."""
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def control(tokenizer: Any, *tokens: str, special: bool = True) -> Any:
    """Return a tokenizer with control tokens added."""
    tokenizer.add_tokens(
        [AddedToken(token, special=special, normalized=False) for token in tokens], special_tokens=special
    )
    return tokenizer


def qwen(texts: Sequence[str], template: str) -> Any:
    """Thoughts and tool calls are added tokens that are not special; there is no begin token."""
    tokenizer = Qwen2Tokenizer(
        **parts(byte_level(texts)), pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=131072
    )
    control(tokenizer, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    control(tokenizer, "<tool_call>", "</tool_call>", "<think>", "</think>", special=False)
    tokenizer.chat_template = template
    return tokenizer


def qwen_3(texts: Sequence[str]) -> Any:
    return qwen(texts, QWEN_3)


def qwen_2_5(texts: Sequence[str]) -> Any:
    return qwen(texts, QWEN_2_5)


def smol_lm_2(texts: Sequence[str]) -> Any:
    """As on the hub: the padding token is the end token, and the unknown token is the only one that nobody needs."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(texts, names),
        unk_token=names[0],
        bos_token=names[1],
        eos_token=names[2],
        pad_token=names[2],
    )
    tokenizer.chat_template = SMOL_LM_2
    return tokenizer


def llama_3_1(texts: Sequence[str]) -> Any:
    """No padding token, but reserved ones; the begin token is written by template and tokenizer both."""
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    others = [f"<|reserved_special_token_{i}|>" for i in range(2)]
    others += ["<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", end]
    inner = byte_level(texts)
    inner.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (begin, "<|end_of_text|>", *others)]
    )
    inner.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, inner.token_to_id(begin))]),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=begin, eos_token=end, model_max_length=131072)
    tokenizer.chat_template = LLAMA_3_1
    return tokenizer


def llama_2(texts: Sequence[str]) -> Any:
    """A base model's: no chat template, and no padding or reserved token."""
    pieces = sentence_pieces(texts, ["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(**pieces, legacy=False, add_bos_token=True)


def gemma_3(texts: Sequence[str]) -> Any:
    marks = ["<start_of_turn>", "<end_of_turn>"]
    pieces = sentence_pieces(texts, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *marks])
    tokenizer = control(GemmaTokenizer(**pieces, add_bos_token=True), *marks)
    tokenizer.chat_template = GEMMA_3
    return tokenizer


def bert(texts: Sequence[str]) -> Any:
    words = sorted({word for text in texts for word in text.lower().replace(":", " : ").split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=512)

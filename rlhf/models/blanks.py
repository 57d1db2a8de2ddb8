"""The blank between a plain prompt and its answer: decoders of Llama 2's kind leave it out where an answer stands alone."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

WORD = "a"  # with a blank before it, a token of each such tokenizer


def lost_blank(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the blank that a tokenizer's decoder leaves out before the first word of a text; empty where it leaves none out."""
    word = _word_id(tokenizer)
    if word is None:
        return ""
    texts = tokenizer.batch_decode([[word], [word, word]])
    return " " if texts == [WORD, f"{WORD} {WORD}"] else ""


def decode_behind(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]]) -> list[str]:
    """Return the texts of answers as they go on behind a plain text, without special tokens.

    Where a decoder would leave a blank out, each is decoded behind a word, which then goes again.
    """
    if not lost_blank(tokenizer):
        texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts
    whole: list[str] = tokenizer.batch_decode(
        [[_word_id(tokenizer), *answer] for answer in answers],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return [text.removeprefix(WORD) for text in whole]


def _word_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the word with a blank before it, written as SentencePiece does; None where there is no such token."""
    word = tokenizer.convert_tokens_to_ids(f"▁{WORD}")
    return None if word is None or word == tokenizer.unk_token_id else int(word)

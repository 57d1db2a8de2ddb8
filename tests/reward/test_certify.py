"""Golden texts and their scores: what a stranger computes from the certificate's ids, and whose model it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf import load_reward_model
from rlhf.errors import UserError
from rlhf.pipeline.certificates import certify_model
from rlhf.reward.certify import CERTIFICATE, ROUNDOFF, certify, computed_in, read_certificate
from tests.reward.planted import make_reward_model

ALL = {
    "short",
    "short, worse",
    "one word",
    "long",
    "several turns",
    "system turn",
    "unicode",
    "typed special tokens",
    "white space",
    "cut off",
    "cut off at once",
}


def test_a_saved_model_has_its_certificate_and_a_stranger_gets_its_numbers(reward_folder: Path) -> None:
    """The other side is plain transformers: its own rendering, its own tokens, its own forward."""
    certificate = json.loads((reward_folder / CERTIFICATE).read_text())
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    assert {text["name"] for text in certificate["golden"]} == ALL
    assert certificate["left_out"] == {}
    for text in certificate["golden"]:
        rendered = tokenizer.apply_chat_template(text["messages"], tokenize=False)
        end = "" if text["ended"] else tokenizer.eos_token
        assert text["text"] + end == rendered
        assert (tokenizer(text["text"])["input_ids"] == text["ids"]) == text["as_rendered"]
        assert text["as_rendered"] or text["name"] == "typed special tokens"
        score = model(input_ids=torch.tensor([text["ids"]])).logits.item()
        assert text["score"] == pytest.approx(score, abs=1e-5)
    scores = torch.tensor([text["score"] for text in certificate["golden"]])
    assert scores.std() > 0.1, "texts differ by far more"


def test_bfloat16_weights_are_scored_in_float32_and_stay_what_they_are(tmp_path: Path) -> None:
    make_reward_model(tmp_path, architecture="qwen3", template=None, dtype=torch.bfloat16, seed=0)
    certificate = json.loads((tmp_path / CERTIFICATE).read_text())
    assert (certificate["dtype"], certificate["computed_in"]) == ("bfloat16", "float32")
    exact = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rounded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    errors = []
    for text in certificate["golden"]:
        ids = torch.tensor([text["ids"]])
        assert text["score"] == pytest.approx(exact(input_ids=ids).logits.item(), abs=1e-5)
        if text["name"] != "long":
            errors.append(rounded(input_ids=ids).logits.item() - text["score"])
    # Three times the root mean square of the errors, by dtype in the ratio of the unit roundoffs.
    error = torch.tensor(errors).square().mean().sqrt().item()
    floor = 1e-5 * max(1.0, *(abs(text["score"]) for text in certificate["golden"]))
    for dtype, roundoff in ROUNDOFF.items():
        assert certificate["tolerance"][dtype] == pytest.approx(3 * error * roundoff * 256 + floor, rel=1e-3)


def test_a_model_is_converted_for_a_while_only(reward_folder: Path) -> None:
    reward = load_reward_model(reward_folder)
    before = [parameter.data for parameter in reward.model.parameters()]
    with computed_in(reward.model, torch.bfloat16) as converted:
        assert converted
        assert reward.model.dtype == torch.bfloat16
    assert all(x.data is y or torch.equal(x.data, y) for x, y in zip(reward.model.parameters(), before, strict=True))
    assert reward.model.dtype == torch.float32


def test_texts_that_a_model_can_not_read_are_named(reward_folder: Path) -> None:
    reward = load_reward_model(reward_folder)
    reward.max_length = 40
    left_out = certify(reward)["left_out"]
    assert left_out["unicode"] == "it has 61 tokens, and the model reads 40"
    reward.max_length = 128
    reward.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}"
        + ("{% endif %}" + reward.tokenizer.chat_template)
    )
    assert certify(reward)["left_out"] == {"system turn": "the chat template refuses it: no system turns"}
    reward.conversational = False
    assert set(certify(reward)["left_out"]) == {"several turns", "system turn"}
    reward.max_length = 3
    with pytest.raises(UserError, match="none of the golden texts"):
        certify(reward)


def test_certify_writes_for_any_model_once_and_refuses_another(reward_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    written, place = certify_model(str(reward_folder), file)
    assert place == file
    assert json.loads(file.read_text()) == json.loads((reward_folder / CERTIFICATE).read_text())
    again, _ = certify_model(str(reward_folder), file)
    assert again == written

    def refused(change: Any) -> str:
        certificate = json.loads((reward_folder / CERTIFICATE).read_text())
        change(certificate)
        file.write_text(json.dumps(certificate))
        with pytest.raises(UserError) as refusal:
            certify_model(str(reward_folder), file)
        return str(refusal.value)

    def another_score(certificate: Any) -> None:
        certificate["golden"][3]["score"] += 0.01

    def another_text(certificate: Any) -> None:
        certificate["golden"][0]["text"] += " "

    assert "golden scores differ by 0.01" in refused(another_score)
    assert "'short' is now another one" in refused(another_text)
    assert "no dtype; delete it" in refused(lambda certificate: certificate.pop("dtype"))
    file.write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        read_certificate(file)
    with pytest.raises(UserError, match="say where the certificate shall be written"):
        certify_model("somebody/model", None)


@pytest.mark.parametrize("content", ["{", '{"model_type": "llama"}', '{"prompt": "a"}\n{"prompt": "b"}\n'])
def test_a_file_that_is_no_certificate_stays_as_it_is(reward_folder: Path, tmp_path: Path, content: str) -> None:
    """Nobody is told to delete a file that is theirs; an empty one is written to, a link to a certificate is followed."""
    file, link = tmp_path / "theirs.json", tmp_path / "link.json"
    file.write_text(content)
    with pytest.raises(
        UserError, match=rf"--out {tmp_path}/theirs.json: is there already, and is no earlier certificate; choose"
    ):
        certify_model(str(reward_folder), file)
    assert file.read_text() == content
    file.write_text("")
    link.symlink_to(file)
    written, _ = certify_model(str(reward_folder), file)
    assert certify_model(str(reward_folder), link)[0] == written

"""`rlhf certify` and `rlhf verify`: golden scores of a reward model, and whoever serves it compared with them."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf.addresses import hide_secrets
from rlhf.errors import UserError
from rlhf.files import write_text
from rlhf.models.open import expand
from rlhf.pipeline.training import quiet_libraries
from rlhf.report.result_file import check_result_file
from rlhf.reward.certify import (
    CERTIFICATE,
    Certificate,
    certify,
    check_certificate,
    read_certificate,
    write_certificate,
)
from rlhf.reward.hypotheses import suppose_faults
from rlhf.reward.load import open_reward_model
from rlhf.reward.targets import (
    KINDS,
    Form,
    Kind,
    Server,
    SeveralLabels,
    ask_folder,
    ask_server,
    find_kind,
    server_forms,
)
from rlhf.reward.verify import DTYPES, FAULTS, Answers, Fault, agree, diagnose, root_mean_square


def certify_model(model: str, out: Path | None) -> tuple[Certificate, Path]:
    """Write a reward model's golden texts and scores, or compare it with those that are there.

    Args:
        out: where to; None: `certificate.json` in the model's folder.

    Returns:
        the certificate, and its file.

    Raises:
        UserError: the model can't be opened, or is not the one that was certified; a hub id without `out`; `out` is there and
            is no certificate.
    """
    quiet_libraries()
    folder = Path(expand(model))
    if out is None and not folder.is_dir():
        raise UserError(f"certify {model}: not a folder; say where the certificate shall be written (--out FILE).")
    file = out or folder / CERTIFICATE
    if out is not None:  # a certificate that a link leads to is compared, not replaced
        check_result_file(
            out.resolve() if out.is_symlink() and out.is_file() else out, "--out", key="golden", result="certificate"
        )
    reward = open_reward_model(model)
    if file.is_file() and (out is None or file.stat().st_size):
        certificate = read_certificate(file)
        check_certificate(reward, certificate, name=model)
        return certificate, file
    certificate = certify(reward)
    write_certificate(file, certificate)
    return certificate, file


def verify_target(
    target: str,
    *,
    against: str,
    kind: str | None,
    token: str | None,
    model: str | None,
    dtype: str | None,
    timeout: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Ask a server or a folder for golden scores and name what is wrong with them.

    Args:
        target: a URL, or a folder.
        against: the reward model that should be served.
        kind: of the target; None: it is found out by asking.
        token: a bearer token.
        model: the model's name there, where a server has several.
        dtype: in which the target should compute; None: that of the saved weights.
        timeout: seconds for each request.

    Returns:
        `{target, kind, against, held, dtype, tolerance, forms, faults, notes}`; `held` where nothing is wrong.

    Raises:
        UserError: the model or the target can't be opened or asked, or answers something else than scores.
    """
    quiet_libraries()
    is_url = _check_question(target, kind, dtype)

    # 1. The model that should be served, its golden texts and scores.
    reward = open_reward_model(against)
    file = Path(expand(against)) / CERTIFICATE
    certificate = read_certificate(file) if file.is_file() else certify(reward)
    if file.is_file():
        check_certificate(reward, certificate, name=against)
    golden = certificate["golden"]
    scores, names = [text["score"] for text in golden], [text["name"] for text in golden]
    expected = dtype or (certificate["dtype"] if certificate["dtype"] in DTYPES else "float32")
    tolerances = certificate["tolerance"]

    # 2. What the target says.
    if is_url:
        server = Server(target, token=token, timeout=timeout)
        apart = reward.reads_prompt_apart
        heard = _hear_server(server, certificate, kind=kind, model=model, target=target, apart=apart, say=say)
    else:
        heard = _hear_folder(target, certificate, say=say)

    # 3. Where that is not what the model says, the fault under which the model itself would say it.
    right = all(agree(answers, scores, tolerances[expected]) for answers in heard.answers)
    hypotheses = [] if right else suppose_faults(reward, golden)
    faults = list(heard.faults)
    for answers in heard.answers:
        faults += diagnose(answers, scores, hypotheses, tolerances, dtype=expected, names=names)
    notes = _notes(certificate, tolerances[expected], heard.forms)
    if heard.kind.startswith("vllm") and any(fault["fault"] in ("sigmoid", "softmax") for fault in faults):
        conversational = certificate["conversational"]
        raw_forms = server_forms(heard.kind, server, conversational=conversational, model=heard.model, raw=True)
        mended = all(agree(ask_server(server, form, golden), scores, tolerances[expected]) for form in raw_forms)
        notes.append(
            f'With "use_activation": false in the request, its scores are {"right" if mended else "still wrong"}.'
        )
    return {
        "target": hide_secrets(target),
        "kind": heard.kind,
        "against": against,
        "held": not faults,
        "dtype": expected,
        "tolerance": tolerances,
        "forms": [_figures(answers, scores, names) for answers in heard.answers],
        "faults": faults,
        "notes": notes,
    }


@dataclass(frozen=True)
class _Heard:
    """What a target answered to the golden texts.

    Attributes:
        kind: what the target is.
        answers: one entry for each form of question.
        forms: of a server, the forms that it was asked in.
        model: the model's name there; None: the server has one, or the target is a folder.
        faults: what was wrong before any score was read.
    """

    kind: Kind
    answers: Sequence[Answers]
    forms: Sequence[Form] = ()
    model: str | None = None
    faults: Sequence[Fault] = ()


def _check_question(target: str, kind: str | None, dtype: str | None) -> bool:
    """Return whether the target is a server's address.

    Raises:
        UserError: an unknown kind or dtype, a kind that does not fit the target, or an address that is none.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"--kind {kind}: choose one of {', '.join(KINDS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    is_url = target.startswith(("http://", "https://"))
    if is_url:
        try:
            urlsplit(target)
        except ValueError as error:
            raise UserError(f"verify {hide_secrets(target)}: is no address ({error}); correct it.") from None
    if is_url == (kind == "folder") and kind is not None:
        raise UserError(
            f"verify {target}: --kind {kind} does not fit; a server's address begins with http:// or https://."
        )
    return is_url


def _hear_server(
    server: Server,
    certificate: Certificate,
    *,
    kind: str | None,
    model: str | None,
    target: str,
    apart: bool,
    say: Callable[[str], None],
) -> _Heard:
    """Return a server's scores of the golden texts, in every form of request that it knows; `apart`: not as one text."""
    golden, began = certificate["golden"], time.monotonic()
    found_kind: Kind = kind or find_kind(server, golden[0])  # type: ignore[assignment]
    name = model or (server.first_model() if found_kind.startswith("vllm") else None)
    answered: list[Answers] = []
    try:
        forms = list(server_forms(found_kind, server, conversational=certificate["conversational"], model=name))
        forms = [form for form in forms if not (apart and form.renders)]
        if not forms:
            raise UserError(f"{target}: no endpoint of kind {found_kind} is there; say what it is (--kind).")
        for form in forms:
            answered.append(ask_server(server, form, golden))
            say(f"{form.name}: {len(answered[-1].rows)} texts asked, {time.monotonic() - began:.1f} s")
    except SeveralLabels:
        return _Heard(found_kind, answered, forms, name, [_several_labels(target)])
    return _Heard(found_kind, answered, forms, name)


def _hear_folder(target: str, certificate: Certificate, *, say: Callable[[str], None]) -> _Heard:
    """Return the scores of the golden texts by the model in a folder, read with plain transformers."""
    began, answered = time.monotonic(), []
    try:
        for answers in ask_folder(target, certificate):
            answered.append(answers)
            say(f"{answers.form}: {len(answers.rows)} texts read, {time.monotonic() - began:.1f} s")
    except SeveralLabels:
        return _Heard("folder", answered, faults=[_several_labels(target)])
    return _Heard("folder", answered)


def _several_labels(target: str) -> Fault:
    """Return the fault of a target that answers with several labels where one score is asked."""
    return Fault(
        fault="labels", form=target, sentence=f"{target}: {FAULTS['labels']}", detail="", difference=None, also=[]
    )


def _figures(answers: Answers, scores: list[float], names: list[str]) -> dict[str, Any]:
    """Return a form's answers, and how far they lie from the model's scores."""
    figures: dict[str, Any] = {"form": answers.form, "texts": [names[i] for i in answers.rows]}
    figures |= {"expected": [scores[i] for i in answers.rows]}
    for way, values in (("alone", answers.alone), ("together", answers.together)):
        differences = None if values is None else [x - scores[i] for x, i in zip(values, answers.rows, strict=True)]
        figures[way] = None if values is None else list(values)
        figures[f"difference_{way}"] = None if differences is None else root_mean_square(differences)
        figures[f"largest_{way}"] = None if differences is None else max(map(abs, differences))
    return figures


def _notes(certificate: Certificate, tolerance: float, forms: Iterable[Form]) -> list[str]:
    """Return what a reader must know of what was not compared."""
    notes = [f"The golden text {name!r} is left out: {reason}." for name, reason in certificate["left_out"].items()]
    if closing := [form.name for form in forms if form.closes]:
        notes.append(
            f"{', '.join(closing)}: such requests close every text, so answers that were cut off are not asked about; they are "
            "scored as if they had ended."
        )
    if typed := [text["name"] for text in certificate["golden"] if not text["as_rendered"]]:
        notes.append(
            f"{', '.join(typed)}: special tokens that a person typed are words to this model. Programs that tokenise rendered text "
            "can't tell them from the template's and are not asked about them; where people type freely, serve with `rlhf serve`."
        )
    scores = [text["score"] for text in certificate["golden"]]
    mean = sum(scores) / len(scores)
    spread = root_mean_square([score - mean for score in scores])
    if spread < 3 * tolerance:
        notes.append(
            f"The golden scores have a deviation of {spread:.3g}, and rounding alone may move answers by {tolerance:.3g}: faults "
            "with a small effect can't be seen. Serve the model in float32 for this check (--dtype float32)."
        )
    return notes


def write_verdict(file: Path, verdict: dict[str, Any]) -> None:
    """Write what was found as JSON."""
    write_text(file, hide_secrets(json.dumps(verdict, indent=1, ensure_ascii=False)) + "\n")

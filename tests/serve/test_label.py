"""The labelling page over a real socket, and in a real browser where one is at hand."""

import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from rlhf.data import labelbook
from rlhf.data.controls import gold_questions
from rlhf.data.labelbook import LabelBook
from rlhf.data.labels import Question, agreement, question_id
from rlhf.data.rows import Pair, assistant_turn, user_turn
from rlhf.reward.controls import report_gold, report_repeats
from rlhf.serve.label import annotator_tokens, label_app, shows_second_on_the_left
from tests.serve.running import running

EVIL = "<script>document.title='taken'</script><b>bold</b>"


def question(number: int) -> Question:
    prompt = [{"role": "user", "content": f"List {number} fruits."}]
    first, second = f"good {number}", EVIL
    return Question(question_id(2, prompt, [first, second]), 2, prompt, first, second, "fruit", 1.5)


def cookie_of(url: str) -> str:
    """The name of the page's cookie: ports of one host have theirs in common."""
    return f"rlhf_annotator_{url.rstrip('/').rpartition(':')[2]}"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[tuple[str, LabelBook, dict[str, str]]]:
    book = LabelBook(tmp_path / "labels.sqlite")
    book.ask([question(i) for i in range(20)])
    tokens = annotator_tokens(book.path, ["ann", "bob"])
    assert annotator_tokens(book.path, ["ann"]) == tokens, "a token is made once"
    with running(label_app(book, 2, tokens, wanted=2, title="x, round 2")) as url:
        yield f"{url}/", book, tokens


@pytest.mark.fault("odd tokens and bodies")
def test_a_wrong_token_sees_nothing(desk: tuple[str, LabelBook, dict[str, str]]) -> None:
    url, book, _ = desk
    for reply in (
        requests.get(url, timeout=10),
        requests.get(url, params={"token": "guess"}, timeout=10),
        requests.post(url, data={"id": question(0).id, "choice": "left"}, timeout=10),
        requests.get(url, cookies={cookie_of(url): "guess"}, timeout=10),
    ):
        assert reply.status_code == 403
        assert "This link is not yours" in reply.text
        assert "good" not in reply.text
    assert book.verdicts() == []


def test_two_rounds_on_one_machine_know_their_people_apart(
    desk: tuple[str, LabelBook, dict[str, str]], tmp_path: Path
) -> None:
    """A browser sends the cookies of a host to each of its ports."""
    url, _, tokens = desk
    browser = requests.Session()
    assert "ann" in browser.get(url, params={"token": tokens["ann"]}, timeout=10).text
    other = LabelBook(tmp_path / "other.sqlite")
    other.ask([question(0)])
    secrets = annotator_tokens(other.path, ["eve"])
    with running(label_app(other, 2, secrets, wanted=1, title="other")) as elsewhere:
        assert "eve" in browser.get(elsewhere, params={"token": secrets["eve"]}, timeout=10).text
        assert "ann" in browser.get(url, timeout=10).text, "the other round's link took this one's cookie away"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://labels.org"}, 303),  # a proxy asked for its own upstream
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://labels.org"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://labels.org"}, 403),
    ],
)
def test_behind_a_proxy_the_browser_says_whose_page_it_was(
    headers: dict[str, str], code: int, desk: tuple[str, LabelBook, dict[str, str]]
) -> None:
    url, _, tokens = desk
    form = {"id": question(0).id, "choice": "left", "left_side": "first", "token": tokens["ann"]}
    reply = requests.post(url, data=form, headers=headers, timeout=10, allow_redirects=False)
    assert reply.status_code == code


@pytest.mark.fault("markup in texts")
def test_the_page_is_blind_escaped_and_drawn_anew_for_everybody(
    desk: tuple[str, LabelBook, dict[str, str]],
) -> None:
    url, _, tokens = desk
    session = requests.Session()
    reply = session.get(url, params={"token": tokens["ann"]}, timeout=10)
    assert reply.url == url, "the token leaves the address"
    assert "<script>document" not in reply.text
    assert "&lt;script&gt;document" in reply.text
    assert "fruit<" not in reply.text
    body = reply.text.split("</style>")[1].split("<script")[0]
    assert not re.search(r"(?<!\d)1\.5(?!\d)", body), "no score is shown (the time of asking may end in 1.5…)"
    policy = reply.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    sides = [[shows_second_on_the_left(name, question(i).id) for i in range(200)] for name in ("ann", "bob")]
    assert 70 < sum(sides[0]) < 130, "a fair coin: ±4 deviations"
    assert 70 < sum(a == b for a, b in zip(*sides, strict=True)) < 130, "one for each annotator"


def test_choices_undo_and_the_end(desk: tuple[str, LabelBook, dict[str, str]]) -> None:
    url, book, tokens = desk
    for name in ("ann", "bob"):
        session = requests.Session()
        page = session.get(url, params={"token": tokens[name]}, timeout=10).text
        for _ in range(20):
            asked = re.search(r'name="id" value="([^"]+)"', page)
            assert asked is not None
            i = [question(number).id for number in range(20)].index(asked[1])
            good = "right" if shows_second_on_the_left(name, question(i).id) else "left"
            bad = "left" if good == "right" else "right"
            choice = {3: "tie", 4: "skip", 6: bad}.get(i, good) if name == "ann" else good
            page = session.post(
                url, data={"id": asked[1], "choice": choice, "shown": str(time.time() - 2)}, timeout=10
            ).text
            if i == 5 and name == "ann":
                page = session.post(url, data={"choice": "undo"}, timeout=10).text
                assert question(5).id in page
                session.post(url, data={"id": question(5).id, "choice": good, "shown": "x"}, timeout=10)
                page = session.get(url, timeout=10).text
        assert "Nothing left for you to label" in page
    assert "rlhf run</code>, <code>rlhf audit" in page, "when the last of them is done; either may have asked"
    assert book.progress(2, wanted=2) == (20, 20, 1), "of one she could not say, and nobody else labels"
    said = {(v.annotator, v.id): v for v in book.verdicts(2)}
    for i in range(20):
        expected = {3: "tie", 4: "skip", 6: "second"}.get(i, "first")
        assert said["ann", question(i).id].label == expected, "whatever side it stood on"
        assert said["bob", question(i).id].label == "first"
    assert said["ann", question(0).id].seconds == pytest.approx(2, abs=1)
    assert said["ann", question(5).id].seconds is None
    assert "κ" in page
    reply = session.post(url, data={"id": "r2-0000000000000000", "choice": "left"}, timeout=10)
    assert reply.status_code == 400
    assert session.post(url, data={"id": question(0).id, "choice": "best"}, timeout=10).status_code == 400


@pytest.mark.browser
@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs a browser and its driver"
)
@pytest.mark.timeout(180)
def test_two_people_label_twenty_pairs_by_keyboard(desk: tuple[str, LabelBook, dict[str, str]], tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    url, book, tokens = desk

    def browser(name: str) -> Any:
        options = webdriver.ChromeOptions()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--window-size=1280,900")
        for flag in (*flags, f"--user-data-dir={tmp_path / name}"):
            options.add_argument(flag)
        options.binary_location = shutil.which("chromium")
        return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))

    def html(driver: Any) -> Any:
        try:
            return driver.find_element(By.TAG_NAME, "html")
        except WebDriverException:  # between two pages there is none
            return None

    def press(driver: Any, key: str) -> None:
        before = html(driver)
        driver.find_element(By.TAG_NAME, "body").send_keys(key)
        deadline = time.monotonic() + 20
        while html(driver) in (None, before):
            assert time.monotonic() < deadline, "the page did not change"
            time.sleep(0.02)

    for name in ("ann", "bob"):
        driver = browser(name)
        try:
            driver.get(f"{url}?token=wrong")
            assert "This link is not yours" in driver.page_source
            driver.get(f"{url}?token={tokens[name]}")
            assert driver.title == "x, round 2", "the script in an answer did not run"
            texts = {driver.find_element(By.ID, side).text for side in ("left", "right")}
            assert EVIL in texts, "it is shown as text"
            driver.save_screenshot(str(tmp_path / f"{name}-ask.png"))
            for i in range(20):
                assert f"{i} answered by you" in driver.find_element(By.ID, "progress").text
                left = driver.find_element(By.ID, "left").text
                good = Keys.ARROW_LEFT if left.startswith("good") else Keys.ARROW_RIGHT
                press(driver, Keys.ARROW_DOWN if i == 7 and name == "ann" else good)
                if i == 9 and name == "ann":
                    press(driver, "u")
                    press(driver, "s")
            assert "Nothing left for you to label" in driver.page_source
            driver.save_screenshot(str(tmp_path / f"{name}-done.png"))
        finally:
            driver.quit()
    labels = {(v.annotator, v.id): v.label for v in book.verdicts(2)}
    assert sorted(label for (name, _), label in labels.items() if name == "ann")[-2:] == ["skip", "tie"]
    assert sum(label == "first" for label in labels.values()) == 38
    assert agreement(book.verdicts(2))["pairs"][0]["agree"] == pytest.approx(18 / 19)


def fields(page: str) -> dict[str, str]:
    """Return the hidden fields of the page's form, as a browser would send them."""
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', page))


def click_good(page: str) -> dict[str, str]:
    """Return what a browser sends when somebody clicks on the good answer."""
    left = re.search(r'id="left">([^<]*)<', page)
    assert left is not None
    return fields(page) | {"choice": "left" if left[1].startswith("good") else "right"}


@pytest.mark.fault("two people in one browser")
def test_two_people_in_one_browser_keep_their_clicks_apart(desk: tuple[str, LabelBook, dict[str, str]]) -> None:
    """Both have a page open while the one cookie jar holds the token of whoever came last."""
    url, book, tokens = desk
    browser = requests.Session()
    pages = {name: browser.get(url, params={"token": tokens[name]}, timeout=10).text for name in ("ann", "bob")}
    shown: dict[str, list[str]] = {"ann": [], "bob": []}
    for i in range(20):
        for name in ("ann", "bob") if i % 2 else ("bob", "ann"):
            assert f"<span>{name}</span>" in pages[name], "the page that follows is the same person's"
            shown[name].append(fields(pages[name])["id"])
            reply = browser.post(url, data=click_good(pages[name]), timeout=10)
            assert tokens[name] not in reply.url
            pages[name] = reply.text
    labels = {(v.annotator, v.id): v.label for v in book.verdicts(2)}
    assert shown["ann"] != shown["bob"], "everybody has an order of their own"
    assert sorted(shown["ann"]) == sorted(shown["bob"]) == sorted(question(i).id for i in range(20))
    for name in ("ann", "bob"):
        assert [labels[name, question(i).id] for i in range(20)] == ["first"] * 20
        assert "Nothing left for you to label" in pages[name]
    swapped = [shows_second_on_the_left("ann", question(i).id) != shows_second_on_the_left("bob", question(i).id) for i in range(20)]  # fmt: skip
    assert any(swapped), "or else a cookie could not have turned anything round"
    browser.post(url, data=fields(pages["ann"]) | {"choice": "undo"}, timeout=10)
    left = {(v.annotator, v.id) for v in book.verdicts(2)}
    assert len(left) == 39
    assert ("bob", shown["bob"][-1]) in left, "she takes back her own"


@pytest.mark.fault("two people in one browser")
def test_after_a_fault_each_goes_on_as_herself(
    desk: tuple[str, LabelBook, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`/` is the page of whoever came last in this browser."""
    monkeypatch.setattr(labelbook, "SECONDS_TO_WAIT", 0.1)
    url, book, tokens = desk
    browser = requests.Session()
    pages = {name: browser.get(url, params={"token": tokens[name]}, timeout=10).text for name in ("ann", "bob")}
    form = fields(pages["ann"]) | {"choice": "tie"}
    writer = sqlite3.connect(book.path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    faults = [
        (browser.post(url, data=form | {"id": "r9-x"}, timeout=10), 400),
        (browser.post(url, data=form, timeout=30), 503),
    ]
    writer.execute("ROLLBACK")
    writer.close()
    for reply, code in faults:
        assert reply.status_code == code
        (address,) = re.findall(r'href="(/[^"]*)"', reply.text)
        assert "<span>ann</span>" in browser.get(url + address.lstrip("/"), timeout=10).text
    assert book.verdicts(2) == []


@pytest.mark.fault("two people in one browser")
def test_a_page_means_what_it_showed(desk: tuple[str, LabelBook, dict[str, str]]) -> None:
    """A form is read by the side that it was drawn with, and its token by itself, without any cookie."""
    url, book, tokens = desk
    form = {"id": question(1).id, "token": tokens["bob"], "choice": "left"}
    for left_side in ("first", "second"):
        assert requests.post(url, data=form | {"left_side": left_side}, timeout=10).status_code == 403, (
            "no page follows"
        )
        assert [(v.annotator, v.label) for v in book.verdicts(2)] == [("bob", left_side)]
    assert requests.post(url, data=form | {"left_side": "third"}, timeout=10).status_code == 400
    session = requests.Session()
    session.get(url, params={"token": tokens["ann"]}, timeout=10)
    assert session.post(url, data=form | {"token": "guess"}, timeout=10).status_code == 403, "a cookie mends no token"
    assert len(book.verdicts(2)) == 1


@pytest.mark.fault("odd tokens and bodies")
@pytest.mark.parametrize("text", ["é", "\u2028", "漢字", "\ud83d", "\x00", "a" * 5000], ids=ascii)
def test_odd_tokens_cookies_and_bodies_are_the_senders_fault(
    desk: tuple[str, LabelBook, dict[str, str]], text: str
) -> None:
    url, book, tokens = desk
    raw = text.encode("utf-8", "surrogatepass")
    percent = "".join(f"%{byte:02x}" for byte in raw)
    good = {"Cookie": f"{cookie_of(url)}={tokens['ann']}"}
    replies = [
        requests.get(f"{url}?token={percent}", timeout=10),
        requests.get(f"{url}?person={percent}", headers=good, timeout=10),
        requests.post(url, data=b"token=" + raw, timeout=10),
        requests.post(url, data=f"token={percent}", timeout=10),
        requests.post(url, data=b"id=\xff\xfe&choice=left", headers=good, timeout=10),
        requests.post(url, data=b"id=" + raw + b"&choice=" + raw, headers=good, timeout=10),
    ]
    if b"\x00" not in raw:
        replies.append(requests.get(url, headers={"Cookie": cookie_of(url).encode() + b"=" + raw}, timeout=10))
    assert all(400 <= reply.status_code < 500 for reply in replies), [reply.status_code for reply in replies]
    assert book.verdicts() == []


def test_an_annotator_with_any_name(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    book = LabelBook(tmp_path / "labels.sqlite")
    book.ask([question(1)])
    names = ["Ägypt; ann=1", "李 四"]
    tokens = annotator_tokens(book.path, names)
    client = TestClient(label_app(book, 2, tokens, wanted=2, title="t"))
    pages = {name: client.get("/", params={"token": tokens[name]}).text for name in names}
    for name in names:
        assert client.post("/", data=click_good(pages[name])).status_code == 200
    assert {(v.annotator, v.label) for v in book.verdicts()} == {(name, "first") for name in names}


def test_control_questions_look_like_all_others_and_are_no_labels(tmp_path: Path) -> None:
    """Ann knows what is good; bob clicks on the left. 60 questions each, 8 gold ones, a fifth asked again."""
    from starlette.testclient import TestClient

    book = LabelBook(tmp_path / "labels.sqlite")
    book.ask([question(i) for i in range(1, 61)])
    pairs: list[Pair] = [
        {
            "prompt": user_turn(f"Gold {i}."),
            "chosen": assistant_turn(f"good g{i}"),
            "rejected": assistant_turn(f"bad g{i}"),
        }
        for i in range(8)
    ]
    book.hide_gold(gold_questions(pairs, book.questions(2), 2))
    tokens = annotator_tokens(book.path, ["ann", "bob"])
    app = label_app(book, 2, tokens, wanted=2, title="t", repeat=0.2)
    shapes, names = set(), dict[str, list[str]]()
    for name in ("ann", "bob"):
        client = TestClient(app)
        page = client.get("/", params={"token": tokens[name]}).text
        seen, totals, by_you = list[str](), set[int](), 0
        while "Nothing left" not in page:
            form = click_good(page)
            shapes.add(
                (len(form["id"]), form["id"][:3], tuple(sorted(form)), re.sub(r">[^<]*<", "><", page).count("<"))
            )
            progress = re.search(r"(\d+) of (\d+) labelled, (\d+) answered by you", page)
            assert progress is not None
            assert int(progress[3]) == by_you, "every answer counts one, whatever was asked"
            if name == "ann":
                assert client.get("/").text.count(form["id"]) == 1, "the same again when the page is loaded again"
            totals.add(int(progress[2]))
            form["choice"] = form["choice"] if name == "ann" else "left"
            seen.append(form["id"])
            by_you += 1
            if name == "ann" and by_you == 20:
                client.post("/", data=form)
                page = client.post("/", data={**form, "choice": "undo"}).text
                assert fields(page)["id"] == form["id"], "what was taken back comes again, control or not"
            page = client.post("/", data=form).text
        names[name] = seen
        assert totals == {len(seen)}, "the bar ends with the last question"
    assert len(shapes) == 1, "no name, field or element tells a control question"
    verdicts = book.verdicts(2)
    assert len(verdicts) == 120
    assert {v.id for v in verdicts} == {question(i).id for i in range(1, 61)}, "no control is a label"
    assert all(len(set(seen)) == len(seen) > 66 for seen in names.values())
    report = report_gold(book.verdicts(2, with_gold=True), {g.question.id: g.label for g in book.gold(2)})
    assert report["ann"]["right"] == 1.0
    assert report["ann"]["answered"] >= 3
    again = report_repeats(book.repeats(2))
    assert again["ann"]["alike"] == 1.0
    assert again["ann"]["answered"] + report["ann"]["answered"] == len(names["ann"]) - 60
    assert 0 < again["bob"]["alike"] < 1, "the sides are drawn anew when a question comes again"

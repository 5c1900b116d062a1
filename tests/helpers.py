"""Small but real parts for tests: datasets, language models with tokenizers, configurations, and commands to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forked import run_forked, start_forked

from benchmarks.common.ranks import environments
from shards.__main__ import main as shards_main
from shards.synthetic import write_world

ROOT = Path(__file__).parents[1]


def build_world(folder: Path, *, users: int = 60, items: int = 40, shards: int = 3, **world: Any) -> Path:
    """Build a synthetic dataset."""
    reviews, catalog = write_world(folder / "raw", users=users, items=items, **world)
    out = folder / "dataset"
    code = shards_main(
        f"build {out} --source table --time-unit ms --reviews {reviews} --meta {catalog} --min-item 1 --min-train 3 "
        f"--negatives 19 --title-negatives 5 --shards {shards} --users-per-record 8 --name world".split()
    )
    assert code == 0
    return out


def build_llm(folder: Path, *, family: str = "llama", layers: int = 3) -> Path:
    """Write a random tiny causal LM and a byte-level BPE tokenizer, in Hugging Face layout."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.common.random_llm import write_tokenizer

    texts = ['Item No.1, Time: 2015-03-02, "Amber Brass No. 1"', "This user has made"]
    write_tokenizer(folder, texts, vocabulary=400)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def build_encoder(folder: Path, *, family: str = "bert", layers: int = 2) -> Path:
    """Write a random tiny text encoder and a WordPiece tokenizer, in Hugging Face layout."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(names.values()), show_progress=False)
    titles = [f"Amber Brass Cedar Denim Ember Flint Grove Hazel Ivory Jade Kelp Linen No. {n}" for n in range(60)]
    tokenizer.train_from_iterator([*titles, "title brand category: This user has bought; a, b."], trainer)
    special = [("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    words = {f"{name}_token": token for name, token in names.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words).save_pretrained(folder)
    torch.manual_seed(0)
    windows = {"attention_window": [8] * layers} if family == "longformer" else {}
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        initializer_range=0.1,
        **windows,
    )
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def sasrec_config(data: Path, output: Path, **train: Any) -> dict[str, Any]:
    """Configuration of a small SASRec run."""
    settings = {"batch_size": 16, "lr": 3e-3, "lr_decay": 1.0, "validate_every": 1, "metric": "NDCG@10", "epochs": 3}
    return {
        "output": str(output),
        "data": {"path": str(data), "shuffle_shards": 2},
        "system": {"name": "sasrec", "dim": 16, "max_length": 12, "negatives": 2},
        "train": settings | train,
        "evaluation": {"batch_size": 7},
        "engine": {"threads": 1},  # on a busy machine, tiny operations spend their time in thread synchronisation
    }


def llm_srec_config(data: Path, output: Path, teacher: Path, llm: Path, **train: Any) -> dict[str, Any]:
    """Configuration of a small LLM-SRec run."""
    settings = {"batch_size": 10, "lr": 1e-3, "validate_every": 0.5, "epochs": 2, "log_every": 1}
    return {
        "output": str(output),
        "data": {"path": str(data), "shuffle_shards": 2},
        "system": {
            "name": "llm_srec",
            "teacher": str(teacher),
            "hidden_dim": 24,
            "projected_dim": 16,
            "max_history": 5,
            "llm": {"path": str(llm), "dtype": "float32", "max_tokens": 256},
        },
        "train": settings | train,
        "evaluation": {"batch_size": 16},
        "engine": {"threads": 1},
    }


LLM_SYSTEMS = ("tallrec", "llara", "collm", "a_llmrec", "llm_srec")


def llm4rec_config(
    name: str, data: Path, output: Path, llm: Path, runs: Mapping[str, Path], **train: Any
) -> dict[str, Any]:
    """Configuration of a small run of any LLM recommender; `runs` has the runs it may build on, by key."""
    tree = llm_srec_config(data, output, Path("unused"), llm, **train)
    needed = {"tallrec": (), "a_llmrec": ("teacher", "stage1")}.get(name, ("teacher",))
    del tree["system"]["teacher"]
    tree["system"] |= {"name": name} | {key: str(runs[key]) for key in needed}
    return tree


def text_config(data: Path, output: Path, system: dict[str, Any], **train: Any) -> dict[str, Any]:
    """Configuration of a small run of a system that reads text."""
    settings = {"batch_size": 10, "lr": 1e-3, "validate_every": 1, "metric": "NDCG@10", "epochs": 2, "log_every": 1}
    return {
        "output": str(output),
        "data": {"path": str(data), "shuffle_shards": 2},
        "system": system,
        "train": settings | train,
        "evaluation": {"batch_size": 16},
        "engine": {"threads": 1},
    }


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    """Write the tree as a preset file (JSON is valid YAML)."""
    path.write_text(json.dumps(tree))
    return path


def train_run(tree: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Train the configured run with the training command, and assert that it succeeds."""
    output = Path(tree["output"])
    output.parent.mkdir(parents=True, exist_ok=True)
    done = run_command("launchers/train.py", write_config(output.with_suffix(".yaml"), tree))
    assert done.returncode == 0, done.stderr
    return done


def run_cold(
    *words: str | Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a launcher as a user would: `python launchers/...`, from a working folder outside the repository."""
    command = [sys.executable, str(ROOT / words[0]), *map(str, words[1:])]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **(env or {})}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, cwd="/", check=False
    )


def run_command(
    *words: str | Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Like `run_cold`, but in a forked process, which starts within a second: see `run_forked`."""
    return run_forked(ROOT / words[0], words[1:], {"DS_ACCELERATOR": "cpu", **(env or {})}, timeout)


def run_ranks(ranks: int, script: Path, arguments: Sequence[str], timeout: float = 300) -> None:
    """Run a script once per rank in the environment that Slurm or a launcher would set; assert that all succeed."""
    started = [start_forked(script, arguments, environment) for environment in environments(ranks)]
    for done in [process.finish(timeout) for process in started]:
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

"""The prefix cache: entries equal what the LLM would compute, and a cache that does not match is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_llm, llm_srec_config
from llm_parts import retrieval_parts
from nn_helpers import plain_varlen
from torch import Tensor

from trainer.config import LLMConfig, LLMSRecConfig, RunConfig, parse_config
from trainer.data.prompts.packing import pack
from trainer.data.prompts.prefix_cache_index import PrefixCacheIndex
from trainer.data.prompts.prompt import READOUT_SLOT, Prompt
from trainer.data.reading.dataset import open_dataset
from trainer.data.reading.shards import read_in_order
from trainer.models import build_system
from trainer.models.llm.build import prompt_writer
from trainer.nn.llm import attention, prefix_cache
from trainer.nn.llm.backbone import load_llm
from trainer.nn.llm.prefix_cache import (
    FACTS,
    KEYS,
    PrefixCacheError,
    open_prefix_cache,
    prefix_cache_bytes,
    write_prefix_cache,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the cache in many small parts, so that rows continue rows of earlier passes."""
    monkeypatch.setattr(prefix_cache, "_TOKENS_AT_ONCE", 128)


def _items(count: int) -> list[Prompt]:
    """Prompts of an instruction, a title (pairs of titles share a prefix), an item slot and a read-out."""
    rng = np.random.default_rng(0)
    instruction, prompts = rng.integers(2, 400, 12), []
    for number in range(count):
        title = np.random.default_rng(number // 2).integers(2, 400, 14)
        title[10:] = rng.integers(2, 400, 4)
        tokens = np.concatenate([instruction, title, rng.integers(2, 400, 6)])
        end = len(tokens) - 1
        prompts.append(Prompt(tokens, np.array([26, end]), np.array([1, READOUT_SLOT]), np.array([end])))
    return prompts


@pytest.mark.parametrize(("dtype", "kernel"), [("float32", "groups"), ("bfloat16", "groups"), ("float32", "one call")])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "qwen3"])
def test_cached_keys_equal_computed_ones_in_values_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str, kernel: str
) -> None:
    config = LLMConfig(path=str(build_llm(tmp_path / "llm", family=family)), dtype=dtype)
    llm, prompts = load_llm(config), _items(40)
    rows = PrefixCacheIndex.of_prompts(prompts)
    counted: list[int] = []
    write_prefix_cache(tmp_path / "store", llm, config, rows, CPU, counted.append)
    assert sum(counted) == len(rows)
    llm.cache_ML2hd = open_prefix_cache(tmp_path / "store", config, rows, verify=True)
    some = [prompts[number] for number in (3, 2, 30, 11)]
    vector_SD = torch.randn(8, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    plain, cached = pack(some), pack(some, cached=rows.by_prefix)
    assert plain.run_tokens - cached.run_tokens == 12 + 3 * 10 + 4 * 4 - 1, "all but the token that is always run"
    found = []
    for packed in (plain, cached):
        if kernel == "one call" and packed is cached:
            monkeypatch.setattr(attention, "varlen_kernel", lambda query: plain_varlen)
        out = llm(packed, vector_SD)
        found.append((out, *torch.autograd.grad((out * torch.arange(32)).sum(), vector_SD)))
    rtol, atols = (1e-5, (1e-5, 3e-5)) if dtype == "float32" else (0.1, (0.1, 0.1))  # tolerances of values, gradients
    for expected, got, atol in zip(*found, atols, strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def _config(world: Path, teacher: Path, llm: Path, store: Path | None, **system: Any) -> RunConfig:
    tree = llm_srec_config(world, Path("unused"), teacher, llm)
    tree["system"] |= system
    tree["system"]["llm"]["title_store"] = str(store) if store else None
    return parse_config(tree, "test")


def _write(config: RunConfig, folder: Path) -> None:
    system = config.system
    assert isinstance(system, LLMSRecConfig)
    dataset = open_dataset(config.data.path, full_check=False)
    rows = PrefixCacheIndex.of_items(prompt_writer(system, dataset), dataset.num_items)
    write_prefix_cache(folder, load_llm(system.llm), system.llm, rows, CPU)


@pytest.fixture(scope="module")
def store(world: Path, teacher: Path, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "store"
    _write(_config(world, teacher, tiny_llm, None), folder)
    return folder


@pytest.mark.parametrize("targets", ["last", "window"])
def test_loss_gradients_and_scores_equal_those_without_a_cache(
    world: Path, teacher: Path, tiny_llm: Path, store: Path, targets: str
) -> None:
    dataset = open_dataset(world, full_check=False)
    users = next(read_in_order(world, dataset.manifest)).take(slice(0, 10))
    found: list[dict[str, Tensor]] = []
    run = []
    for folder in (None, store):
        torch.manual_seed(0)
        config = _config(world, teacher, tiny_llm, folder, targets=targets)
        model, collator = retrieval_parts(build_system(config, dataset))
        batch = collator.train(users, slice(0, 10), 0)
        total = model.loss(model(batch)).total
        torch.autograd.backward(total)
        items = collator.items(np.arange(1, dataset.num_items + 1))
        with torch.no_grad():
            scores = model.user_vectors(collator.histories(users.train)) @ model.item_vectors(items).T
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append({name: grad for name, grad in trained.items() if grad is not None})
        assert found[-1].keys() == trained.keys()
        found[-1] |= {"loss": total.detach(), "scores": scores}
        run.append((batch.prompts.run_tokens, items.prompts.run_tokens))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-5, msg=name)
    assert found[0]["scores"].std() > 1e-3, "constant scores would agree with anything"
    assert run[1][0] < run[0][0]
    closing = run[1][1] / dataset.num_items
    assert closing == int(closing) + 1 / dataset.num_items, "the same few tokens per item, and one that is always run"


def test_a_flipped_byte_is_found(store: Path, world: Path, teacher: Path, tiny_llm: Path, tmp_path: Path) -> None:
    dataset, damaged = open_dataset(world, full_check=False), tmp_path / "store"
    damaged.mkdir()
    for name in (KEYS, FACTS):
        (damaged / name).write_bytes((store / name).read_bytes())
    config = _config(world, teacher, tiny_llm, damaged)
    build_system(config, dataset)
    content = bytearray((store / KEYS).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / KEYS).write_bytes(bytes(content))
    with pytest.raises(PrefixCacheError, match=r"keys\.bin is damaged .*compute it with `launchers/title_store\.py`"):
        build_system(config, dataset)
    (damaged / KEYS).write_bytes(bytes(content[:-1]))
    unchecked = config.model_copy(update={"data": config.data.model_copy(update={"verify": False})})
    with pytest.raises(PrefixCacheError, match=r"keys\.bin is damaged"):
        build_system(unchecked, dataset)
    (damaged / FACTS).write_text("{")
    with pytest.raises(PrefixCacheError, match="is not a prefix cache, or is damaged"):
        build_system(config, dataset)


def test_a_cache_of_a_different_model_or_prompt_is_refused(
    store: Path, world: Path, teacher: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    dataset = open_dataset(world, full_check=False)
    other = tmp_path / "llm"
    build_llm(other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(PrefixCacheError, match="a different language model, or different layers or dtype"):
        build_system(_config(world, teacher, other, store), dataset)
    with pytest.raises(PrefixCacheError, match="different titles or prompt templates"):
        build_system(_config(world, teacher, tiny_llm, store, prompt="paper"), dataset)


def test_a_cache_that_does_not_fit_on_disk_leaves_no_files(tmp_path: Path, tiny_llm: Path) -> None:
    """A limit on the file size (RLIMIT_FSIZE) stands in for a full disk, which would need a small file system."""
    config = LLMConfig(path=str(tiny_llm), dtype="float32")
    rows = PrefixCacheIndex.of_prompts(_items(40))
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (prefix_cache_bytes(config, rows) - 1, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_prefix_cache(tmp_path / "store", load_llm(config), config, rows, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []

"""Language models large enough for their memory and FLOPs to be measured, and a count of what operations do."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import build_llm
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIZE = {
    "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 400,
}  # fmt: skip
LLAMA_3B = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
}  # fmt: skip


def build_larger_llm(folder: Path, *, family: str = "llama", layers: int = 6, **settings: Any) -> Path:
    """Like `build_llm`, but wider."""
    from transformers import AutoConfig, AutoModelForCausalLM

    build_llm(folder, family=family)
    config = AutoConfig.for_model(
        family, num_hidden_layers=layers, max_position_embeddings=512, head_dim=32, **(SIZE | settings)
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what the operations do that run while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved = 0
        """Bytes that operations read and wrote, without matrix products, attention, views and allocations."""
        self.live = self.peak = 0
        """Bytes of the tensors made here that are alive, now and at most."""
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self._known |= {tensor.untyped_storage()._cdata for tensor in inputs}
        result = func(*args, **(kwargs or {}))
        outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        for tensor in outputs:
            self._made(tensor)
        view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if not view and not any(word in func._schema.name for word in ("mm", "attention", "empty", "view", "new_")):
            out = (kwargs or {}).get("out")  # written, not read
            self.moved += sum(tensor.nbytes for tensor in [*inputs, *outputs] if tensor is not out)
            self.moved += 0 if out is None else out.nbytes
        return result

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

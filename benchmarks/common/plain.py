"""The training step of LLM-SRec as its authors published it: the baseline that our trainer is measured against.

Same trained modules, users, negatives and losses as ours, so that a step gives the same loss and the same gradients
(`tests/benchmarks/test_plain.py`). The procedure differs, and follows the description of the official code
(Sein-Kim/LLM-SRec): prompts are strings that are tokenised in every step, markers are found by searching token ids,
user prompts and item prompts go through the LLM in two batches padded on the right without a mask, the LM head runs
over every position and its logits are discarded, the hidden states of all layers and a KV cache are kept, and an item
that is a candidate of two users is encoded twice.

Unlike the official code, and in favour of the baseline: fp32 like ours instead of 8-bit weights, fused attention, slots
filled in one operation instead of a Python loop, negatives drawn for all users at once, and no truncation of long
titles.

Letters: B users, C candidates, S slots, P prompts of one batch, T tokens of the longest prompt, D width of the LLM.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.config import LLMConfig
from trainer.data.collators.base import ItemIds, to_device
from trainer.data.collators.negatives import OFFICIAL_HISTORY, draw_negatives
from trainer.data.collators.retrieval import RetrievalCollator
from trainer.data.reading.counter_rng import IntArray
from trainer.data.reading.histories import Histories, Users
from trainer.models.llm.retrieval import DistilledTerms, LLM4Rec
from trainer.nn.llm.backbone import load_tokenizer

HISTORY, USER_OUT, ITEM_OUT = "[HistoryEmb]", "[UserOut]", "[ItemOut]"
MAX_TOKENS = 1024


class PlainPrompts:
    """Writes the prompts of a step as strings, and tokenises them."""

    def __init__(self, collator: RetrievalCollator, llm: LLMConfig, titles: Sequence[str]) -> None:
        self._collator = collator
        self._titles = titles
        self.tokenizer = load_tokenizer(llm)
        self.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        self.tokenizer.add_special_tokens({"additional_special_tokens": [HISTORY, USER_OUT, ITEM_OUT]})
        self.tokenizer.padding_side = "right"

    def candidates(self, users: Users, epoch: int) -> IntArray:
        """(B, C) item ids: the target, then the negatives that our collator draws for these users."""
        collator = self._collator
        mine = users.train
        forbidden = mine if collator.exclude_user else mine.without_last().last(OFFICIAL_HISTORY)
        negative_BK = draw_negatives(
            forbidden,
            collator.candidates - 1,
            num_items=collator.num_items,
            distinct=True,
            address=(collator.seed, epoch),
        )
        return np.concatenate([mine.last_item_U()[:, None], negative_BK], axis=1)

    def shown(self, users: Users) -> Histories:
        """Histories in the user prompts: the latest items before the target."""
        return users.train.without_last().last(self._collator.max_history)

    def of_users(self, shown: Histories) -> Tensor:
        """(B, T) token ids, padded on the right."""
        return self._encode([self._user_text(shown, row) for row in range(len(shown))])

    def of_items(self, item_P: IntArray) -> Tensor:
        """(P, T) token ids, padded on the right."""
        return self._encode([self._item_text(int(item)) for item in item_P])

    def indices(self, token_PT: Tensor, marker: str) -> tuple[Tensor, Tensor]:
        """Rows and columns of a marker's tokens."""
        token_id = self.tokenizer.convert_tokens_to_ids(marker)
        assert isinstance(token_id, int)
        row_S, column_S = token_PT.eq(token_id).nonzero(as_tuple=True)
        return row_S, column_S

    def useful_lengths(self, users: Users, epoch: int) -> list[int]:
        """Lengths in tokens of each user prompt and each *distinct* item prompt of a step, without padding."""
        batches = (self.of_users(self.shown(users)), self.of_items(np.unique(self.candidates(users, epoch))))
        return [int(n) for token_PT in batches for n in token_PT.ne(self.tokenizer.pad_token_id).sum(1)]

    def _encode(self, texts: Sequence[str]) -> Tensor:
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        token_PT: Tensor = encoded["input_ids"]
        return token_PT

    def _user_text(self, shown: Histories, row: int) -> str:
        events = slice(shown.offset_U1[row], shown.offset_U1[row + 1])
        days = shown.time_E[events].astype("datetime64[ms]").astype("datetime64[D]").astype(str)
        lines = [
            f'Item No.{number}, Time: {day}, "{self._titles[item - 1]}"{HISTORY}'
            for number, (item, day) in enumerate(zip(shown.item_E[events], days, strict=True), 1)
        ]
        return (
            f"This user has made a series of purchases in the following order: {','.join(lines)}. "
            f"Based on this sequence of purchases, generate user representation token:{USER_OUT}"
        )

    def _item_text(self, item: int) -> str:
        return (
            f'The item title and item embedding are as follows: "{self._titles[item - 1]}"{HISTORY}, '
            f"then generate item representation token:{ITEM_OUT}"
        )


class PlainLLMSRec:
    """Computes the terms of a step by the published procedure, with the trained modules of `model`.

    Args:
        recompute: gradient checkpointing, which the official code turns on wherever the LLM is quantised.
        head: False leaves out the outputs that are not used: logits, the hidden states of all layers, the KV cache.
    """

    def __init__(
        self,
        model: LLM4Rec,
        collator: RetrievalCollator,
        llm: LLMConfig,
        titles: Sequence[str],
        *,
        recompute: bool,
        head: bool = True,
    ) -> None:
        self.model = model
        self._head = head
        self.prompts = PlainPrompts(collator, llm, titles)
        assert collator.teacher is not None
        assert model.reader.teacher is not None
        assert model.reader.item_projector is not None
        assert model.distillation is not None
        self._teacher_batch = collator.teacher.histories
        self._teacher, self._item_projector = model.reader.teacher, model.reader.item_projector
        self._distillation = model.distillation
        settings = AutoConfig.from_pretrained(llm.path, trust_remote_code=False, local_files_only=True)
        settings.num_hidden_layers = llm.layers or settings.num_hidden_layers
        self.lm = AutoModelForCausalLM.from_pretrained(
            llm.path,
            config=settings,
            dtype=getattr(torch, llm.dtype),
            attn_implementation="sdpa",
            trust_remote_code=False,
            local_files_only=True,
        )
        # Never fewer rows than the LLM has: some tables are larger than their tokenizer, and the head costs as much.
        rows = max(len(self.prompts.tokenizer), settings.vocab_size)
        self.lm.resize_token_embeddings(rows, mean_resizing=False)
        self._device = next(model.user_head.parameters()).device
        torch.nn.Module.to(self.lm, self._device)
        self.lm.requires_grad_(False)
        self.lm.train()  # Hugging Face recomputes in training mode only; without dropout both modes compute the same
        if recompute:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # deprecated, but every transformers 5 has it
                self.lm.gradient_checkpointing_enable()

    def terms(self, users: Users, epoch: int) -> DistilledTerms:
        """The terms that `LLM4Rec.forward` returns for the batch that our collator builds from the same users."""
        shown, item_BC = self.prompts.shown(users), self.prompts.candidates(users, epoch)
        item_P = item_BC.flatten()
        user_token_PT, item_token_PT = self.prompts.of_users(shown), self.prompts.of_items(item_P)
        user_PD = self._read(user_token_PT, shown.item_E, USER_OUT, self.model.user_out(len(user_token_PT)))
        item_PD = self._read(item_token_PT, item_P, ITEM_OUT, self.model.item_out(len(item_token_PT)))
        user_BD = self.model.user_head(user_PD)
        item_BCD = self.model.item_head(item_PD).view(*item_BC.shape, -1)
        with torch.no_grad():
            teacher_BD = self._teacher.user_vectors(
                to_device(self._teacher_batch(users.train.without_last()), self._device)
            )
        score_BC = (user_BD[:, None] * item_BCD).sum(-1)
        real_B1 = torch.ones(len(user_BD), 1, device=self._device)
        # Our terms have an axis of targets per user; here each user has one.
        score_B1C, user_B1D, teacher_B1D = (x[:, None] for x in (score_BC, user_BD, self._distillation(teacher_BD)))
        return DistilledTerms(real_B1, score_B1C, user_B1D, teacher_B1D, targets=len(user_BD))

    def _read(self, token_PT: Tensor, item_S: IntArray, out: str, out_PD: Tensor) -> Tensor:
        """(P, D) last hidden states at the read-outs of prompts that hold `item_S` in their history slots, in order."""
        token_PT = token_PT.to(self._device)
        embedding_PTD = self.lm.get_input_embeddings()(token_PT)
        with torch.no_grad():
            item_SD = self._teacher.item_vectors(ItemIds(torch.from_numpy(item_S).to(self._device)))
        vector_SD = self._item_projector(item_SD).to(embedding_PTD.dtype)
        embedding_PTD = embedding_PTD.index_put(self.prompts.indices(token_PT, HISTORY), vector_SD)
        readout = self.prompts.indices(token_PT, out)
        embedding_PTD = embedding_PTD.index_put(readout, out_PD.to(embedding_PTD.dtype))
        if self._head:
            last_PTD = self.lm(inputs_embeds=embedding_PTD, output_hidden_states=True).hidden_states[-1]
        else:
            last_PTD = self.lm.model(inputs_embeds=embedding_PTD, use_cache=False).last_hidden_state
        hidden_PD: Tensor = last_PTD[readout].float()
        return hidden_PD

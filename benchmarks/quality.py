"""Every system on MovieLens-100k with one budget, for [quality.md](quality.md).

    python -m benchmarks.quality run llara tallrec            # train the rows that are named; all without names
    python -m benchmarks.quality table                        # results of all that have ended

A run that is stopped resumes. Settings given as `key=value` hold for all runs of a call, e.g. `engine.threads=1`. Needs
what `make quickstart` leaves, and `python launchers/demo_models.py encoder cache/minilm`; the LLM runs in bf16, which
needs a GPU, or a CPU with AMX, or patience.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from benchmarks.common.machine import RESULTS, describe, write
from benchmarks.common.trained import test_results
from launchers.train import main as train
from trainer.config import load_config
from trainer.evaluation.ranking import Estimate

RUNS = Path("runs/quality")
TEACHER = Path("runs/quickstart/sasrec")
SEEDS = (0, 1, 2)
STEPS = 192

_TEACHER = f"system.teacher={TEACHER}"
_LLM = (
    "system.llm.path=cache/smollm2-135m", "system.llm.layers=3", "system.llm.dtype=bfloat16",
    "system.llm.max_tokens=512", "train.lr=3e-4", "train.lr_decay=1.0", "train.validate_every=1",
    "evaluation.batch_size=32", "evaluation.valid_users=300",
)  # fmt: skip
_RETRIEVAL = (
    *_LLM, f"train.max_steps={STEPS}", f"train.decay_steps={STEPS}", f"train.decay_from={STEPS * 2 // 3}",
    "train.metric=NDCG@10", "system.readout_init=standardized", "system.train_candidates=batch",
)  # fmt: skip
_WINDOW = (*_RETRIEVAL, "system.targets=window", "system.batch_negatives=1")
# A user vector at the start of the prompt forbids that targets share it: one target per user, and more negatives.
_LAST = (*_RETRIEVAL, "system.targets=last", "system.batch_negatives=15")
_LLM_SREC = ("llm_srec", *_WINDOW, _TEACHER, "system.distillation=contrastive")
_TITLES = (*_LLM, "train.max_steps=96")

_ABLATIONS: dict[str, tuple[str, ...]] = {
    "llm_srec": _LLM_SREC,
    "llm_srec_b": (*_LLM_SREC, "system.uniformity_weight=0"),
    "llm_srec_a": (*_LLM_SREC, "system.uniformity_weight=0", "system.distill_weight=0"),
}
"""LLM-SRec, (b) without uniformity, and (a) without uniformity and distillation, as in Table 8."""

ROWS: dict[str, tuple[str, ...]] = {
    "gru4rec": ("gru4rec", "train.max_steps=975"),
    "nextitnet": ("nextitnet", "train.max_steps=975"),
    "bert4rec": ("bert4rec", "train.max_steps=4500"),
    "ctrl": ("ctrl",),
    "recformer_stage1": ("ml100k_recformer_stage1",),
    "recformer": ("ml100k_recformer_stage2", f"system.stage1={RUNS}/recformer_stage1"),
    "tallrec": ("tallrec", *_WINDOW),
    "llara": ("llara", *_WINDOW, _TEACHER),
    "collm": ("collm", *_LAST, _TEACHER),
    "a_llmrec_stage1": ("a_llmrec_stage1", _TEACHER, "train.lr=3e-4"),
    "a_llmrec": ("a_llmrec", *_LAST, _TEACHER, f"system.stage1={RUNS}/a_llmrec_stage1"),
    **{f"{name}_seed{seed}": (*words, f"seed={seed}") for seed in SEEDS for name, words in _ABLATIONS.items()},
    "tallrec_titles": ("tallrec_generation", *_TITLES),
    "llara_titles": ("llara_generation", *_TITLES, _TEACHER),
    "collm_titles": ("collm_generation", *_TITLES, _TEACHER),
    "a_llmrec_titles": ("a_llmrec_generation", *_TITLES, _TEACHER, f"system.stage1={RUNS}/a_llmrec_stage1"),
}
"""Preset and settings of each run, those that others build on first."""

PAPER: dict[str, tuple[float, float, float, float]] = {
    "gru4rec": (0.3152, 0.2642, 0.2364, 0.2155),
    "bert4rec": (0.2959, 0.2576, 0.1867, 0.3019),
    "nextitnet": (0.2538, 0.2263, 0.1712, 0.2207),
    "sasrec": (0.3459, 0.2918, 0.2267, 0.3451),
    "ctrl": (0.2785, 0.2152, 0.1680, 0.2968),
    "recformer": (0.2068, 0.2907, 0.2032, 0.3238),
    "tallrec": (0.1668, 0.2585, 0.2249, 0.3100),
    "llara": (0.1522, 0.2844, 0.2048, 0.2464),
    "collm": (0.3223, 0.3111, 0.2565, 0.3152),
    "a_llmrec": (0.3263, 0.2875, 0.2791, 0.3119),
    "llm_srec": (0.3560, 0.3388, 0.3044, 0.3809),
}
"""NDCG@10 in Table 6: Movies, Scientific, Electronics, CDs."""


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: all")
    options, settings = parser.parse_known_args()
    names = [word for word in options.rows if "=" not in word] or list(ROWS)
    settings = [word for word in [*options.rows, *settings] if "=" in word]
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"unknown rows {', '.join(unknown)}")
    if options.what == "table":
        _table()
        return
    for name in names:
        preset, *words = ROWS[name]
        train([preset, f"output={RUNS / name}", *words, *settings])


def _table() -> None:
    """Print the tables of quality.md from the runs that have ended, and write `results/quality.json`."""
    known = {"sasrec_10": TEACHER.parent / "sasrec_10", "sasrec": TEACHER, **{name: RUNS / name for name in ROWS}}
    found = {name: results for name, run in known.items() if (results := test_results(run))}
    ranking = {name: results for name, results in found.items() if "NDCG@10" in results[0].metrics}
    titles = {name: results for name, results in found.items() if name not in ranking}
    sasrec = found["sasrec"][0].metrics["NDCG@10"].value
    print(
        "| system | best step | NDCG@10 | HR@10 | shuffled | of SASRec's | in the paper | minutes |\n"
        "|---|---:|---|---|---:|---:|---|---:|"
    )
    for name, (original, shuffled) in ranking.items():
        ndcg, order = original.metrics["NDCG@10"], shuffled.metrics["NDCG@10"]
        print(
            f"| {name} | {original.step} | {_interval(ndcg)} | {_interval(original.metrics['HR@10'])} "
            f"| {100 * (order.value / ndcg.value - 1):+.1f} % | {ndcg.value / sasrec:.2f} "
            f"| {_in_the_paper(original.system) if name != 'sasrec_10' else ''} | {_minutes(known[name]):.0f} |"
        )
    print("\n| ablation | NDCG@10 by seed | mean | shuffled, mean |\n|---|---|---:|---:|")
    for name in _ABLATIONS:
        seeds = [ranking[key] for seed in SEEDS if (key := f"{name}_seed{seed}") in ranking]
        values = [original.metrics["NDCG@10"].value for original, _ in seeds]
        losses = [s.metrics["NDCG@10"].value / o.metrics["NDCG@10"].value - 1 for o, s in seeds]
        if values:
            each = ", ".join(f"{value:.4f}" for value in values)
            print(f"| {name} | {each} | {mean(values):.4f} | {100 * mean(losses):+.1f} % |")
    print("\n| titles | best step | HR@1 | shuffled | minutes |\n|---|---:|---|---:|---:|")
    for name, (original, shuffled) in titles.items():
        hits = original.metrics["HR@1"]
        change = 100 * (shuffled.metrics["HR@1"].value / hits.value - 1) if hits.value else 0.0
        print(f"| {name} | {original.step} | {_interval(hits)} | {change:+.1f} % | {_minutes(known[name]):.0f} |")
    rows = {
        name: {
            "step": original.step,
            "original": {key: asdict(estimate) for key, estimate in original.metrics.items()},
            "shuffled": {key: asdict(estimate) for key, estimate in shuffled.metrics.items()},
        }
        for name, (original, shuffled) in found.items()
    }
    write(RESULTS / "quality.json", {"machine": describe(), "runs": rows})


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def _in_the_paper(system: str) -> str:
    """NDCG@10 divided by SASRec's in the paper: the mean of its four datasets, and their range."""
    ratios = [value / sasrec for value, sasrec in zip(PAPER[system], PAPER["sasrec"], strict=True)]
    return "1" if system == "sasrec" else f"{mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _minutes(run: Path) -> float:
    """Minutes in training steps, from the logged rates: without validations, saves and the start."""
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    key = "speed/users_per_second"
    speeds: dict[int, float] = {row["step"]: row[key] for row in rows if key in row}
    batch_size = load_config(run / "config.yaml").train.batch_size
    steps = sorted(speeds)
    spans = (step - before for before, step in zip([0, *steps], steps, strict=False))
    return sum(span * batch_size / speeds[step] for span, step in zip(spans, steps, strict=True)) / 60


if __name__ == "__main__":
    main()

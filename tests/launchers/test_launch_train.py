"""`launchers/train.py`, run as a command: the files that it writes and the lines that it prints."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from helpers import ROOT, run_command, sasrec_config, write_config
from launch_helpers import Trained, contents

from trainer.engine.recording.board import MAIN_METRICS
from trainer.engine.recording.board import tag as board_tag
from trainer.evaluation.ranking import METRIC_NAMES
from trainer.reports.results import Result, read

pytestmark = pytest.mark.process

LOSSES = {"train/loss", "train/retrieval", "train/distillation", "train/uniformity"}
SPEED = {
    "speed/goodput",
    "speed/users_per_second",
    "speed/useful_tokens_per_second",
    "speed/tokens_run_share",
    "memory/peak_gib",
}
VALIDATION = {f"valid/{name}@{k}" for name in ("HR", "NDCG") for k in (1, 5, 10, 20)} | {"valid/MRR"}
TRAIN_TAGS = LOSSES | SPEED | {"train/lr", "train/grad_norm"}
TAGS = TRAIN_TAGS | VALIDATION | {"speed/validation_seconds"}


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_both_systems_are_tested_on_original_and_shuffled_histories(srec: Trained, teacher: Path) -> None:
    for run, system in ((srec.output, "llm_srec"), (teacher, "sasrec")):
        found = read(run / "results.jsonl")
        assert [(r.system, r.split, r.history, r.users) for r in found] == [
            (system, "test", "original", 61),
            (system, "test", "shuffled", 61),
        ]
        best = json.loads((run / "checkpoints/best.json").read_text())["step"]
        assert {r.step for r in found} == {best}
        assert {r.num_candidates for r in found} == {20}
        assert all(
            0.0 <= e.low <= e.value <= e.high <= 1.0 for r in found for e in (r.metrics[name] for name in METRIC_NAMES)
        )


def test_metrics_and_tensorboard_hold_the_same_numbers(srec: Trained) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = records(srec.output)
    steps = [record for record in written if "train/loss" in record]
    validations = [record for record in written if "valid/MRR" in record]
    assert [record["step"] for record in steps] == list(range(1, 15))  # 2 epochs of 7 steps, log_every=1
    assert [record["step"] for record in validations] == [4, 7, 11, 14]  # twice an epoch
    assert all(set(record) == TRAIN_TAGS | {"step", "time"} for record in steps)
    assert all(
        record["train/loss"] == pytest.approx(sum(record[t] for t in LOSSES - {"train/loss"})) for record in steps
    )
    assert [record["train/lr"] for record in steps[2:5]] == pytest.approx([1e-3, 1e-3, 0.95e-3])
    assert all(0.0 < record["speed/tokens_run_share"] < 1.0 for record in steps)

    board = EventAccumulator(str(srec.output), size_guidance={"scalars": 0})
    board.Reload()
    of_validation = {f"{group}/{name}" for group in ("best", "valid_percent") for name in MAIN_METRICS}
    of_test = {f"best/test {name}{order}" for name in ("NDCG@10", "HR@10") for order in ("", " shuffled")}
    logged = {board_tag(tag, "llm_srec") for tag in TAGS}
    assert set(board.Tags()["scalars"]) == logged | of_validation | of_test
    best = json.loads((srec.output / "checkpoints/best.json").read_text())["step"]
    at_best = next(record for record in validations if record["step"] == best)
    for name in MAIN_METRICS:  # the last value, which HPARAMS shows
        last = board.Scalars(f"best/{name}")[-1]
        assert (last.step, last.value) == (best, pytest.approx(at_best[f"valid/{name}"]))
    assert [point.step for point in board.Scalars("valid_percent/MRR")] == [4, 7, 11, 14]  # fewer than 100 steps
    answers = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("answers/text_summary")]
    assert len(answers) == 4
    assert all("| original history | shuffled history |" in text for text in answers)
    assert all(text.count("rank of the next item") == 3 for text in answers)
    for tag in TAGS:
        points, expected = board.Scalars(board_tag(tag, "llm_srec")), [record for record in written if tag in record]
        assert [point.step for point in points] == [record["step"] for record in expected]
        assert [point.value for point in points] == pytest.approx([record[tag] for record in expected])


def test_the_terminal_shows_only_our_lines_and_the_log_keeps_them(srec: Trained) -> None:
    log = (srec.output / "log.txt").read_text()
    assert srec.stderr == log
    first, device, *lines, last = [line.split(" ", 1)[1] for line in log.splitlines()]
    assert first.startswith("llm_srec on world: 61 users, 40 items, ")
    assert first.endswith("trained parameters, 1 rank(s), 14 steps of 10 users")
    assert device.startswith("device: cpu (")
    assert last == f"item vectors kept in {srec.output / 'item_vectors.safetensors'}"
    steps = {record["step"]: record for record in records(srec.output) if "train/loss" in record}
    validations = {record["step"]: record for record in records(srec.output) if "valid/MRR" in record}
    said_steps = [line for line in lines if "loss" in line]
    said_validations = [line for line in lines if "validation" in line]
    assert len(lines) == len(said_steps) + len(said_validations)
    for (step, record), line in zip(steps.items(), said_steps, strict=True):
        assert line.startswith(f"step {step}/14  loss {record['train/loss']:.4f}  lr {record['train/lr']:.2e}  ")
        assert re.search(r"  [\d,]+ tokens/s  ETA \d+:\d\d:\d\d$", line)
    for (step, record), line in zip(validations.items(), said_validations, strict=True):
        numbers = "  ".join(f"{name} {record[f'valid/{name}']:.4f}" for name in ("HR@10", "NDCG@10", "MRR"))
        assert line.startswith(f"step {step}/14  validation  {numbers}  (")
    best = json.loads((srec.output / "checkpoints/best.json").read_text())["step"]
    assert [line for line in said_validations if line.endswith("best so far")][-1].startswith(f"step {best}/14 ")


def shown(result: Result, metric: str) -> str:
    return f"{result.metrics[metric].value:.4f}"


def test_the_table_compares_the_system_with_its_teacher(srec: Trained, teacher: Path) -> None:
    for run, system in ((srec.output, "llm_srec"), (teacher, "sasrec")):
        original, shuffled = read(run / "results.jsonl")
        row = next(line for line in srec.stdout.splitlines() if line.startswith(system))
        numbers = re.findall(r"\d\.\d{4}", row)
        assert numbers[0] == shown(original, "NDCG@10")
        assert numbers[2] == shown(shuffled, "NDCG@10")


def test_the_same_command_again_only_prints_the_table(srec: Trained, tmp_path: Path) -> None:
    run = Path(shutil.copytree(srec.output, tmp_path / "srec"))
    before = contents(run)
    done = run_command("launchers/train.py", srec.preset, f"output={run}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == srec.stdout
    after = contents(run)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name for name in changed if not name.startswith("events.out.tfevents.")} == {"config.yaml", "log.txt"}
    assert after["config.yaml"].decode().splitlines()[0] == f"output: {run}"
    assert done.stderr.splitlines()[-1].endswith("resuming from step 14")
    assert len(done.stderr.splitlines()) == 3  # the run, its device


def test_a_terminal_gets_a_progress_bar_between_whole_lines(srec: Trained, tmp_path: Path) -> None:
    run = Path(shutil.copytree(srec.output, tmp_path / "srec"))
    command = [sys.executable, str(ROOT / "launchers/train.py"), str(srec.preset), f"output={run}", "train.epochs=3"]
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 110, 0, 0))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        try:
            while chunk := os.read(main, 4096):
                shown += chunk
        except OSError:  # the other end is closed
            pass
    os.close(main)
    assert process.returncode == 0
    # What is on the screen after all carriage returns, and every state of the bar.
    lines = [line.rsplit("\r", 1)[-1] for line in shown.decode().replace("\r\n", "\n").split("\n")]
    bars = [piece for piece in re.split(r"[\r\n]", shown.decode()) if re.match(r" *\d+%\|", piece)]
    assert bars[0].startswith(" 67%|")  # resumes at 14 of 21 steps
    assert re.match(r"100%\|█+\| 21/21 \[\d\d:\d\d, loss \d\.\d{4}, ETA \d:\d\d:\d\d\]", bars[-1])
    said = [line for line in lines if re.match(r"\d\d:\d\d:\d\d (step|llm_srec|device|resuming)", line)]
    assert len(said) == 3 + 7 + 2  # start, device, resume, steps, validations: the bar leaves each line whole
    # A bar below it, of an evaluation, is cleared by spaces, and leaves the cursor one line up.
    rest = [line for line in lines if line.replace("\x1b[A", "").strip() and line not in said and "%|" not in line]
    rest = [line for line in rest if "item vectors kept in" not in line]
    assert rest == []


def test_a_loss_that_is_not_finite_ends_the_run_with_the_users_of_its_batch(tmp_path: Path, world: Path) -> None:
    """A learning rate that is far too high: the first step moves the weights out of range, the second detects it.

    Both cures that it names are followed: without a checkpoint, and with one.
    """
    settings = sasrec_config(world, tmp_path / "run", lr=1e30, epochs=1)
    preset = write_config(tmp_path / "preset.yaml", settings)
    done = run_command("launchers/train.py", preset)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    what = r"error: step 2: the loss is (nan|inf) .*nonfinite\.json\. Lower train\.lr \(it is 1e\+30\) or set "
    assert re.search(what + r"train\.grad_clip \(it is 0\), and start again$", done.stderr.strip())
    done = run_command("launchers/train.py", preset, "train.lr=1e-3")
    assert done.returncode == 0, done.stderr

    done = run_command("launchers/train.py", preset, f"output={tmp_path / 'saved'}", "train.save_every=1")
    assert re.search(what + r".*and choose another output, or remove .*saved first: .*up to step 1, only", done.stderr)
    other = [f"output={tmp_path / 'saved'}", "train.save_every=1", "train.lr=1e-3"]
    assert run_command("launchers/train.py", preset, *other).returncode == 2
    shutil.rmtree(tmp_path / "saved")
    done = run_command("launchers/train.py", preset, *other)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/nonfinite.json").read_text())
    assert report["step"] == 2
    assert len(set(report["users"])) == settings["train"]["batch_size"]

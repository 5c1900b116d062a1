"""Configurations: loading, overrides, validation, dumping and hashing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers import ROOT
from pydantic import ValidationError

from trainer.config import (
    ConfigError,
    LLMSRecConfig,
    RunConfig,
    SystemConfig,
    config_hash,
    dump_config,
    extensions,
    load_config,
    parse_config,
)

PRESETS = sorted(
    path
    for path in (ROOT / "trainer" / "presets").glob("**/*.yaml")
    if path.parent.name not in ("experiments", "recipes")
)

SYSTEMS = ", ".join(
    sorted(get_args(kind.model_fields["name"].annotation)[0] for kind in get_args(get_args(SystemConfig)[0]))
)

SASREC: dict[str, Any] = {"output": "runs/a", "data": {"path": "data"}, "system": {"name": "sasrec"}}
LLM_SREC: dict[str, Any] = {
    **SASREC,
    "system": {"name": "llm_srec", "teacher": "runs/teacher", "llm": {"path": "cache/llm"}},
}


def with_value(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the tree with one value changed."""
    copied: dict[str, Any] = json.loads(json.dumps(tree))
    *sections, leaf = path.split(".")
    section = copied
    for name in sections:
        section = section.setdefault(name, {})
    section[leaf] = value
    return copied


def refused(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, "a.yaml")
    message = str(caught.value)
    assert message.startswith("a.yaml: ")
    assert "\n" not in message
    return message


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(LLM_SREC))
    return file


def changed(preset: Path, *words: str) -> RunConfig:
    return load_config(preset, words)


def test_there_are_presets() -> None:
    systems = {"sasrec.yaml", "gru4rec.yaml", "bert4rec.yaml", "nextitnet.yaml", "llm_srec.yaml"}
    assert systems <= {preset.name for preset in PRESETS}


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_every_preset_loads(file: Path) -> None:
    config = load_config(file)
    assert config.system.name


@pytest.mark.parametrize("tree", [SASREC, LLM_SREC])
def test_dump_is_read_back(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = with_value(with_value(tree, "train.lr", 1e-05), "output", "runs/ü 'x': #1")
    tree = with_value(with_value(tree, "train.betas", [0.5, 0.75]), "train.max_steps", None)
    config = parse_config(tree, "test")
    written = tmp_path / "config.yaml"
    written.write_text(dump_config(config), encoding="utf-8")
    assert load_config(written) == config
    assert dump_config(load_config(written)) == dump_config(config)
    assert "keep_checkpoints: 2" in dump_config(config), "defaults are written too"


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("ouput", "did you mean 'output'?"),
        ("train.lrr", "did you mean 'lr'?"),
        ("train.epoch", "did you mean 'epochs'?"),
        ("data.worker", "did you mean 'workers'?"),
        ("system.max_histories", "did you mean 'max_history'?"),
        ("system.llm.row_token", "did you mean 'max_tokens'?"),
        (
            "evaluation.zzz",
            "known keys: batch_size, candidates, decode, lists, seed, test_histories, tie, users, valid_users",
        ),
        (
            "system.llm.zzz",
            "known keys: dtype, kernels, layers, max_title_tokens, max_tokens, packing, path, quantization, recompute, "
            "title_store",
        ),
    ],
)
def test_a_wrong_key_is_named_with_its_path(path: str, suggestion: str) -> None:
    assert refused(with_value(LLM_SREC, path, 1)) == f"a.yaml: unknown key '{path}' ({suggestion})"


def test_keys_of_another_system_are_not_suggested() -> None:
    message = refused(with_value(SASREC, "system.teacher", "runs/teacher"))
    assert message.startswith("a.yaml: unknown key 'system.teacher' (")
    assert "did you mean 'teacher'" not in message
    assert "projected_dim" not in refused(with_value(SASREC, "system.zzz", 1))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("train.lr", "fast", "'train.lr': Input should be a valid number"),
        ("train.lr", 0, "greater than 0 (got 0)"),
        ("train.lr", float("inf"), "finite"),
        ("train.validate_every", float("inf"), "finite"),
        ("train.lr", float("nan"), "'train.lr'"),
        ("train.epochs", 0, "greater than or equal to 1"),
        ("train.metric", "HR@7", "'HR@10'"),
        ("train.betas", [0.9], "'train.betas"),
        ("train.betas", [0.9, 1.0], "'train.betas.1'"),
        ("train.batch_size", 10**30, "'train.batch_size': Input should be less than 2147483648"),
        ("seed", 10**30, "'seed': Input should be less than 9223372036854775808"),
        ("train.keep_checkpoints", 1, "greater than or equal to 2"),
        ("train.save_minutes", 0, "'train.save_minutes': Input should be greater than 0"),
        ("train.save_every", 0, "'train.save_every': Input should be greater than or equal to 1"),
        ("system.llm.dtype", "float16", "'system.llm.dtype': Input should be 'float32' or 'bfloat16' (got 'float16')"),
        ("system.llm", "cache/llm", "'system.llm'"),
        ("train", None, "'train'"),
        ("system.name", "sas_rec", f"unknown system 'sas_rec' in 'system.name' (one of: {SYSTEMS})"),
        ("system", {}, f"missing key 'system.name' (one of: {SYSTEMS})"),
        ("system", "sasrec", "'system'"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(path: str, value: Any, words: str) -> None:
    tree = json.loads(json.dumps(LLM_SREC))
    section = tree
    for name in path.split(".")[:-1]:
        section = section.setdefault(name, {})
    section[path.split(".")[-1]] = value
    assert words in refused(tree)


@pytest.mark.parametrize("path", ["output", "data", "data.path", "system", "system.teacher", "system.llm.path"])
def test_a_missing_key_is_named(path: str) -> None:
    tree = json.loads(json.dumps(LLM_SREC))
    section = tree
    *sections, leaf = path.split(".")
    for name in sections:
        section = section[name]
    del section[leaf]
    assert refused(tree) == f"a.yaml: missing key '{path}' (set it in the preset or pass {path}=...)"


def test_settings_that_do_not_fit_together() -> None:
    for name in ("sasrec", "bert4rec"):
        tree = with_value(SASREC, "system", {"name": name, "dim": 10, "heads": 3})
        assert "'system': Value error, dim=10 is not a multiple of heads=3" in refused(tree)
    tree = with_value(SASREC, "system", {"name": "nextitnet", "dim": 9, "block": "one_layer"})
    assert "dim=9 is odd, but block=one_layer convolves in half the width: make dim even" in refused(tree)
    tree = with_value(SASREC, "train", {"save_minutes": None})
    assert "no checkpoint would be written: set train.save_minutes or train.save_every" in refused(tree)
    assert parse_config(with_value(tree, "train.save_every", 9), "a.yaml").train.save_minutes is None


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ({"name": "bert4rec", "mask_share": 0}, "'system.mask_share': Input should be greater than 0"),
        ({"name": "bert4rec", "mask_share": 1.1}, "less than or equal to 1"),
        ({"name": "bert4rec", "last_item_share": -0.1}, "'system.last_item_share'"),
        ({"name": "bert4rec", "max_length": 1}, "greater than or equal to 2"),
        ({"name": "nextitnet", "kernel": 1}, "'system.kernel': Input should be greater than or equal to 2"),
        ({"name": "nextitnet", "dilations": []}, "'system.dilations': Tuple should have at least 1 item"),
        ({"name": "nextitnet", "dilations": [1, 0]}, "'system.dilations.1'"),
        ({"name": "gru4rec", "negatives": 0}, "'system.negatives'"),
        ({"name": "gru4rec", "bpr_elu": -1}, "'system.bpr_elu'"),
        ({"name": "gru4rec", "loss": "bce"}, "'full_softmax', 'sampled_softmax' or 'bpr_max' (got 'bce')"),
        ({"name": "sasrec", "gbce_t": 1.5}, "'system.gbce_t'"),
    ],
)
def test_impossible_settings_of_id_systems(system: dict[str, Any], words: str) -> None:
    assert words in refused(with_value(SASREC, "system", system))


def test_all_problems_at_once() -> None:
    tree = with_value(LLM_SREC, "train.lrr", 1)
    for path, value in [("data.workers", -1), ("system.llm.max_tokens", 3), ("nonsense", 1), ("seed", "x")]:
        tree = with_value(tree, path, value)
    del tree["output"]
    message = refused(tree)
    for path in ("train.lrr", "data.workers", "system.llm.max_tokens", "nonsense", "seed", "output"):
        assert f"'{path}'" in message
    assert message.count("; ") == 5


def test_values_cannot_change() -> None:
    config = parse_config(SASREC, "test")
    with pytest.raises(ValidationError):
        config.train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("train.lr=3e-4", "train.lr", 3e-4),
        ("train.lr=.5E+0", "train.lr", 0.5),
        ("train.lr=0.25", "train.lr", 0.25),
        ("train.lr=1", "train.lr", 1.0),
        ("train.max_steps=1e4", "train.max_steps", 10_000),
        ("train.max_steps=7", "train.max_steps", 7),
        ("train.max_steps=null", "train.max_steps", None),
        ("train.max_steps=", "train.max_steps", None),
        ("train.betas=[0.8, 9e-1]", "train.betas", (0.8, 0.9)),
        ("evaluation.test_histories=[shuffled]", "evaluation.test_histories", ("shuffled",)),
        ("evaluation.test_histories=[]", "evaluation.test_histories", ()),
        ("train.metric=NDCG@10", "train.metric", "NDCG@10"),
        ("data.verify=false", "data.verify", False),
        ("output=runs/a=b", "output", Path("runs/a=b")),
        ('output="1e5"', "output", Path("1e5")),
        ("output=nan", "output", Path("nan")),
        ("output=1e5", "output", Path("1e5")),
        ("output=2024-99-99", "output", Path("2024-99-99")),
        ("output=runs/a #2", "output", Path("runs/a #2")),
        ("output=runs: [1", "output", Path("runs: [1")),
        ("output='runs/a #2'", "output", Path("runs/a #2")),
        ("output=it's", "output", Path("it's")),
        ("output=!!python/object/apply:os.getcwd []", "output", Path("!!python/object/apply:os.getcwd []")),
        ("output=~/runs", "output", Path.home() / "runs"),
        ("data.path=~", "data.path", Path.home()),
        ("system.teacher=~/a ~", "system.teacher", Path.home() / "a ~"),
        ("system.llm.path=1e5", "system.llm.path", "1e5"),
        ("system.llm.path=~/llm", "system.llm.path", str(Path.home() / "llm")),
        ("system.llm.title_store=true", "system.llm.title_store", "true"),
        ("system.llm.title_store=null", "system.llm.title_store", None),
        ("engine.deepspeed=123", "engine.deepspeed", "123"),
        ("train.metric='MRR'", "train.metric", "MRR"),
        ("system.user_vector=true", "system.user_vector", True),
        ("system.user_vector=end", "system.user_vector", "end"),
        ("system.train_candidates=6", "system.train_candidates", 6),
        ("output=08", "output", Path("08")),
        ("system.llm.path='2024-01-01'", "system.llm.path", "2024-01-01"),
        ("system={name: sasrec, dim: 8}", "system.dim", 8),
    ],
)
def test_overrides(preset: Path, word: str, path: str, value: Any) -> None:
    found: Any = changed(preset, word)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_overrides_reach_new_sections_and_the_last_wins(preset: Path) -> None:
    config = changed(preset, "train.epochs=3", "system.llm.max_tokens=128", "train.epochs=4")
    assert config.train.epochs == 4
    assert isinstance(config.system, LLMSRecConfig)
    assert config.system.llm.max_tokens == 128
    assert config.system.llm.path == "cache/llm", "the rest of the section stays"


def test_a_section_left_empty_in_the_file_can_be_filled(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output: o\ndata: {path: d}\nsystem: {name: sasrec}\ntrain:\n")
    assert load_config(file, ["train.epochs=3"]).train.epochs == 3


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("train.lr", "'train.lr' is not an override: write section.key=value"),
        ("=3", "'=3' is not an override"),
        ("train.lr=[1", "not valid YAML; quote it"),
        ("train.lr=2024-99-99", "not valid YAML; quote it"),
        ("output.x=1", "output is a value, not a section"),
        ("system.name.x=1", "name is a value, not a section"),
        ("train.lrr=1", "unknown key 'train.lrr' (did you mean 'lr'?)"),
        ("system.llm.pth=1", "unknown key 'system.llm.pth' (did you mean 'path'?)"),
        ("train..lr=1", "unknown key 'train.'"),
        ("train.lr=!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_wrong_overrides(preset: Path, word: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(preset, word)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.lr=fast"], "the command line: 'train.lr': Input should be a valid number"),
        (["train.lr=1", "system.llm.pth=1"], "the command line: unknown key 'system.llm.pth'"),
        (["system.name=sasrecc"], "the command line: unknown system 'sasrecc' in 'system.name'"),
        (["train.save_minutes=null"], "{preset} and the command line: 'train': Value error, no checkpoint would"),
        (["seed=x", "data.workers=x"], "the command line: 'data.workers': Input should be a valid integer, unable to"),
    ],
)
def test_errors_name_the_command_line_where_it_is_at_fault(preset: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(preset, *words)
    assert str(caught.value).startswith(said.format(preset=preset))


def test_errors_of_the_file_and_of_the_command_line_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output: o\ndata: {path: d, workres: 3}\nsystem: {name: sasrec}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["train.epochs=x"])
    assert str(caught.value).startswith(
        f"{file}: unknown key 'data.workres' (did you mean 'workers'?); the command line: "
    )


def test_a_home_folder_in_a_file_is_expanded(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output: ~/o\ndata: {path: ~/d}\nsystem: {name: ctrl, encoder: {path: ~/e}, aligned: ~/a}\n")
    config = load_config(file)
    assert (config.output, config.data.path) == (Path.home() / "o", Path.home() / "d")
    assert config.system.encoder.path == str(Path.home() / "e")  # type: ignore[union-attr]
    assert load_config(file, ["system.aligned=null"]).system.aligned is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1", "must contain a mapping of sections"),
        ("", "must contain a mapping of sections"),
        ("just text", "must contain a mapping of sections"),
        ("a: [1", "is not valid YAML"),
        ("a: 2024-99-99", "is not valid YAML"),
        ("a: \x00", "is not valid YAML"),
        ("a: " + "[" * 100_000, "is not valid YAML: it is nested too deeply"),
        (
            "a: &a [1]\nb: *a",
            r"is not valid YAML: aliases \(\*name\) are not read: write the value out .*line 2, column 4",
        ),
        ("a: " + "9" * 5000, "is not valid YAML"),
    ],
)
def test_files_that_are_not_a_configuration(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"{file} {words}"):
        load_config(file)


def test_a_value_of_any_size_is_named_in_one_short_line(tmp_path: Path, preset: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(preset.read_text().rstrip().removesuffix("}") + ', "seed": [' + "[1, 2, 3], " * 300 + "]}")
    with pytest.raises(ConfigError, match="'seed': Input should be a valid integer") as caught:
        load_config(file)
    assert len(str(caught.value)) < 500


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=f"cannot read {file}"):
        load_config(file)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path)


def test_a_missing_file_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file: .*nothing\.yaml .*llm_srec\.yaml.*sasrec\.yaml"):
        load_config(tmp_path / "nothing.yaml")


FREE = [
    "output=elsewhere",
    "resume=never",
    "evaluation.decode=false",
    "data.path=elsewhere",
    "data.workers=3",
    "data.verify=false",
    "train.epochs=99",
    "train.max_steps=7",
    "train.micro_batch_size=2",
    "train.patience=3",
    "train.save_minutes=7",
    "train.save_every=7",
    "train.keep_checkpoints=5",
    "train.log_every=1",
    "train.trackers=[]",
    "evaluation.batch_size=1",
    "system.teacher=/elsewhere/teacher",
    "system.llm.kernels=liger",
    "system.llm.recompute=true",
    "system.llm.title_store=/elsewhere/titles",
    "system.llm.path=/elsewhere/llm",
    "evaluation.test_histories=[original]",
    "evaluation.lists=false",
    "engine.deepspeed=zero2",
    "engine.deterministic=true",
    "engine.threads=3",
    "engine.timeout=60",
]
DECIDES = [
    "seed=1",
    "data.shuffle_shards=3",
    "data.training_order=history",
    "data.repeat_dates=last",
    "train.lr=3e-4",
    "train.warmup_steps=5",
    "train.decay_steps=50",
    "train.decay_from=10",
    "train.init_from=runs/last-week",
    "train.batch_size=21",
    "train.betas=[0.9, 0.99]",
    "train.weight_decay=0.1",
    "train.grad_clip=1",
    "train.lr_decay=1",
    "train.validate_every=1",
    "train.metric=MRR",
    "evaluation.users=5",
    "evaluation.valid_users=5",
    "evaluation.candidates=full",
    "evaluation.tie=optimistic",
    "evaluation.seed=4",
    "system.prompt=paper",
    "system.max_history=9",
    "system.train_candidates=5",
    "system.max_vector_items=3",
    "system.batch_negatives=2",
    "system.log_q=false",
    "system.projector_init=token_scale",
    "system.negative_policy=official",
    "system.distill_weight=0",
    "system.teacher_dropout=true",
    "system.targets=window",
    "task=generation",
    "system.llm.layers=3",
    "system.llm.dtype=float32",
    "system.llm.max_tokens=999",
    "system.llm.packing=rows",
    "system.llm.quantization=int8",
    "system.llm.quantization=fp8",
    "system.llm.max_title_tokens=9",
]


def test_the_hash_ignores_what_may_change_between_starts(preset: Path) -> None:
    before = config_hash(changed(preset))
    assert len(before) == 12
    assert int(before, 16) >= 0
    for word in FREE:
        assert changed(preset, word) != changed(preset), word
        assert config_hash(changed(preset, word)) == before, word


def test_the_hash_covers_what_decides_the_result(preset: Path) -> None:
    decays = "train.decay_steps=60"  # which `train.decay_from` needs
    hashes = {word: config_hash(changed(preset, decays, word)) for word in ["seed=0", *DECIDES]}
    assert len(set(hashes.values())) == len(hashes)


def test_every_key_is_listed_as_free_or_deciding(preset: Path) -> None:
    """A new key must be added to one of the two lists above."""
    tree = changed(preset).model_dump(mode="json", exclude={"system"})
    keys = {f"{name}.{key}" for name, section in tree.items() if isinstance(section, dict) for key in section}
    keys |= {name for name, section in tree.items() if not isinstance(section, dict)}
    assert keys == {word.partition("=")[0] for word in [*FREE, *DECIDES] if not word.startswith("system")}


def test_the_hash_does_not_depend_on_how_a_number_is_written(preset: Path) -> None:
    assert len({config_hash(changed(preset, f"train.lr={text}")) for text in ("1", "1.0", "1e0", "10e-1")}) == 1


def test_no_torch_is_needed() -> None:
    code = (
        "import sys, trainer.config, trainer.runs.folder\n"
        f"trainer.config.load_config(trainer.runs.folder.Path({str(PRESETS[0])!r}))\n"
        "print(sorted({'torch', 'deepspeed', 'transformers', 'polars', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_extensions_are_the_settings_beyond_the_paper() -> None:
    assert extensions(load_config(Path("quickstart_llm_srec_paper")).system) == ()
    assert extensions(load_config(Path("sasrec")).system) == ()
    assert extensions(
        load_config(Path("quickstart_llm_srec"), ["system.max_vector_items=9", "system.teacher_titles=0.5"]).system
    ) == (
        "system.max_vector_items=9",
        "system.train_candidates=batch",
        "system.user_vector=end",
        "system.score_distill_weight=1.0",
        "system.teacher_titles=0.5",
    )

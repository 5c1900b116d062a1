"""Schema of experiments and recipes, which are data, in `trainer/presets/experiments` and `recipes`; torch-free.

An experiment says which systems are trained in which variations, and what is measured of them. A recipe says how each
system is trained at one budget; the same recipe serves all experiments, so that they share runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trainer.config import ConfigError, HistoryOrder, Task, load_section
from trainer.config.presets import find_in, names_in
from trainer.config.section import Section

Settings = dict[str, Any]
"""`section.key` to its value, for all systems that have the key; `NAME,...:section.key` for the systems of these names.
A value `$NAME` is that of the option NAME."""

Groups = Literal["none", "transition", "popularity"]
Measure = Literal["ranking", "similarity", "minutes", "statistics"]

NAMES = {
    "sasrec": "SASRec",
    "gru4rec": "GRU4Rec",
    "bert4rec": "BERT4Rec",
    "nextitnet": "NextItNet",
    "ctrl": "CTRL",
    "recformer": "RECFORMER",
    "tallrec": "TALLRec",
    "llara": "LLaRA",
    "collm": "CoLLM",
    "a_llmrec": "A-LLMRec",
    "llm_srec": "LLM-SRec",
}
"""The paper's names of the systems."""


class Option(Section):
    """A choice that the paper leaves open."""

    default: Any
    choices: tuple[Any, ...] = ()
    """Values that it may have; none: any."""
    about: str


class Cases(Section):
    """Users grouped by which systems rank their target first, as in the paper's Figure 6."""

    top: Any = 1
    """A system is right if it ranks the target among this many; may be an option."""
    examples: Any = 3
    """Users shown per pattern, a fixed random sample; may be an option."""


class Experiment(Section):
    """One table or figure: its rows are systems in their variants, its columns all other choices."""

    title: str
    table: str | None = None
    """The paper's table whose values are shown beside ours, such as `Table 3`."""
    systems: tuple[str, ...]
    """Names in the recipe; none only where nothing is trained (`measure: statistics`)."""
    task: Task = "retrieval"
    """Task that is tested; systems that the recipe trains for it are trained for it."""
    options: dict[str, Option] = Field({})
    rows: dict[str, Settings] = Field({"": {}}, min_length=1)
    """Variants of each system, by label."""
    training: dict[str, Settings] = Field({"": {}}, min_length=1)
    """Ways to train each of them, by label: columns."""
    sources: str = "original"
    """How the runs that systems build on (teachers, first stages) are trained: in the `original` order, or in the
    `same` way as the systems."""
    histories: dict[str, HistoryOrder] = Field({"": "original"}, min_length=1)
    """Histories at inference, by label: columns."""
    groups: Groups = "none"
    """`transition`: users by their transition score. `popularity`: users by the popularity of their target."""
    measure: Measure = "ranking"
    """`ranking`: metrics of the target's rank. `similarity`: cosine of each user's vectors for the original and the
    shuffled history. `minutes`: of an epoch of training steps, and of ranking all users. `statistics`: of the
    dataset."""
    elsewhere: str = ""
    """Instead of the dataset's own users those of other datasets (`--other`), with this for the vectors of their items
    (`trainer.models.transfer`); "": the dataset's own."""
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] = ("NDCG@10",)
    change: Literal["none", "training", "histories"] = "none"
    """Columns whose second is compared with their first, in percent."""
    reference: str = "llm_srec"
    """System, or label of a row, that the others are compared with."""
    picture: Literal["bars", "scatter"] = "bars"
    """`scatter`: the second of the `change` columns against the first."""
    cases: Cases | None = None
    """Users by which systems are right, with examples; None: none."""

    @model_validator(mode="after")
    def _columns_to_compare(self) -> Self:
        columns = {"none": 2, "training": len(self.training), "histories": len(self.histories)}[self.change]
        if columns < 2:
            raise ValueError(f"change: {self.change} compares two columns, but there is one")
        if not self.systems and self.measure != "statistics":
            raise ValueError("systems: name at least one")
        if self.cases and (not 1 < len(self.systems) < 5 or len(self.rows) > 1 or len(self.training) > 1):
            raise ValueError(
                "cases: every pattern of right and wrong is counted: compare two to four systems, without variants"
            )
        if self.cases and (self.task != "retrieval" or self.measure != "ranking"):
            raise ValueError("cases: needs task: retrieval and measure: ranking")
        if self.picture == "scatter" and self.change == "none":
            raise ValueError("picture: scatter needs columns to compare: set change")
        return self


class RecipeSystem(Section):
    """How one system is trained."""

    preset: str
    use: tuple[str, ...] = ()
    """Groups of settings, applied in this order before `set`."""
    set: dict[str, Any] = Field({})
    builds_on: dict[str, str] = Field({})
    """Name in the recipe of the run behind each key, for example `teacher: sasrec`."""


class Recipe(Section):
    """How every system is trained at one budget."""

    title: str
    groups: dict[str, dict[str, Any]] = Field({})
    """Settings that several systems share, by name."""
    systems: dict[str, RecipeSystem]
    titles: dict[str, RecipeSystem] = Field({})
    """The same for title generation, of the systems that are trained for it."""
    options: dict[str, Any] = Field({})
    """Values of experiments' options that this recipe needs."""

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for name, entry in [*self.systems.items(), *self.titles.items()]:
            if unknown := set(entry.use) - set(self.groups):
                raise ValueError(f"{name} uses a group that does not exist: {', '.join(sorted(unknown))}")
            if unknown := set(entry.builds_on.values()) - set(self.systems):
                raise ValueError(f"{name} builds on a system that does not exist: {', '.join(sorted(unknown))}")
        return self

    def entry(self, name: str, task: Task = "retrieval") -> RecipeSystem:
        """How a system is trained for a task; one without an own training for titles is trained to retrieve items.

        Raises:
            ConfigError: the recipe does not have it.
        """
        entries = self.systems | self.titles if task == "generation" else self.systems
        if name in entries:
            return entries[name]
        raise ConfigError(f"the recipe has no system {name!r}{_cure(name, list(entries))}")

    def settings(self, name: str, task: Task = "retrieval") -> dict[str, Any]:
        """The entry's groups and own settings, the latter last."""
        entry = self.entry(name, task)
        settings: dict[str, Any] = {}
        for group in entry.use:
            settings |= self.groups[group]
        return settings | entry.set


def load_experiment(path: Path) -> Experiment:
    """Load a packaged experiment by its name, or a file.

    Raises:
        ConfigError: no such experiment, or a key or value is wrong.
    """
    return load_section(_find("experiments", path), Experiment)


def load_recipe(path: Path) -> Recipe:
    """Load a packaged recipe by its name, or a file.

    Raises:
        ConfigError: no such recipe, or a key or value is wrong.
    """
    return load_section(_find("recipes", path), Recipe)


def chosen_options(experiment: Experiment, recipe: Recipe, words: Sequence[str]) -> dict[str, Any]:
    """The value of each option: of `NAME=VALUE` words, else the recipe's, else its default.

    Raises:
        ConfigError: an unknown option or value.
    """
    import yaml

    given = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator or name not in experiment.options:
            known = ", ".join(experiment.options) or "none"
            raise ConfigError(f"--option {word}: write NAME=VALUE (options of this experiment: {known})")
        given[name] = yaml.safe_load(text)
    values = {}
    for name, option in experiment.options.items():
        values[name] = given.get(name, recipe.options.get(name, option.default))
        if option.choices and values[name] not in option.choices:
            choices = ", ".join(map(str, option.choices))
            raise ConfigError(f"option {name}={values[name]}: {option.about} (one of: {choices})")
    return values


def _find(folder: Literal["experiments", "recipes"], path: Path) -> Path:
    found = find_in(folder, path)
    if found == path and not path.is_file():
        raise ConfigError(f"there are no {folder} called {path}{_cure(str(path), names_in(folder))}")
    return found


def _cure(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else f" (one of: {', '.join(known)})"

"""What a study is: a base run, what varies, and what is measured.

A study file is Python and ends with ``study = Study(...)``, or with a function ``study(scale: str) -> Study``. Nothing
heavy is imported here, so that a study's state is known within a moment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust_peft.config import METHOD_PARAMETERS, RunConfig, SurgeryConfig, to_dict
from robust_peft.pixel_units import NORMS, as_number, eps_problem
from robust_peft.presets import get_preset

if TYPE_CHECKING:
    from robust_peft.studies.records import Record
    from robust_peft.studies.report_blocks import Section

Settings = Mapping[str, Any]
"""Dotted names of a `RunConfig`'s fields with their values: ``{"surgery.gamma": 0.8, "seed": 1}``."""


@dataclass(frozen=True)
class Method:
    """One way to train: a point of a front.

    Attributes:
        family: What it is a member of, e.g. "CA-AT"; a family's members share a colour and make up one front.
        label: What tells it from the others of its family, e.g. "gamma 0.8"; empty where it is the only one.
        settings: What the base run's settings become.
    """

    family: str
    label: str = ""
    settings: Settings = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family} ({self.label})" if self.label else self.family


def grid(family: str, parameter: str, values: Sequence[Any], settings: Settings | None = None) -> tuple[Method, ...]:
    """A family of methods that differ in one parameter.

    Args:
        family: The family's name.
        parameter: Dotted name of the setting, e.g. "surgery.gamma".
        values: Its values, one method each.
        settings: What all of them have in common, e.g. ``{"surgery.name": "ca-at"}``.
    """
    short = parameter.rsplit(".", 1)[-1]
    return tuple(Method(family, f"{short} {value}", {**(settings or {}), parameter: value}) for value in values)


@dataclass(frozen=True)
class Measurement:
    """How a trained model is measured. One is the same for every method of a study.

    Attributes:
        attacks: Attacks by name, "clean" among them.
        split: "validation" (held out of the training images) or "test".
        limit: Only the first so many images of the split; None: all.
        audit: Whether `robust_peft.audit` goes with it.
        each: Try every attack on every sample, also those that another one has broken.
        eps: Budgets beside the run's own, in pixel units, e.g. ("4/255", "12/255"); with the norm before it where it is
            another one, e.g. "l2 0.5". Under each norm those of the attacks are tried that exist for it.
    """

    attacks: tuple[str, ...]
    split: str = "test"
    limit: int | None = None
    audit: bool = False
    each: bool = False
    eps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.split not in ("validation", "test"):
            raise ValueError(f"split should be validation or test. Found split = {self.split!r}.")
        if isinstance(self.attacks, str) or "clean" not in self.attacks or len(self.attacks) < 2:
            raise ValueError(f"attacks should be clean and at least one attack, by name. Found {self.attacks!r}.")
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 1):
            raise ValueError(f"limit should be at least 1 or None. Found limit = {self.limit!r}.")
        for text, (norm, eps) in zip(self.eps, self.budgets(""), strict=True):
            if norm not in ("", *NORMS) or as_number(eps) is None or (norm and eps_problem(norm, eps)):
                raise ValueError(f'eps should be budgets like "4/255", or "l2 0.5" with a norm. Found {text!r}.')

    def budgets(self, norm: str) -> list[tuple[str, str]]:
        """Norm and budget of each of ``eps``.

        Args:
            norm: The run's own, for those that name none.
        """
        parts = [text.rpartition(" ") for text in self.eps]
        return [(named or norm, eps) for named, _, eps in parts]


@dataclass(frozen=True)
class Point:
    """One run of a study.

    Attributes:
        panel: One label for each axis, e.g. ``{"data": "MNIST"}``; points of one panel are compared with each other.
        method: How it is trained.
        seed: Its seed.
        config: The whole run, resolved.
    """

    panel: Mapping[str, str]
    method: Method
    seed: int
    config: RunConfig

    @property
    def panel_name(self) -> str:
        return ", ".join(self.panel.values()) or "all"

    @property
    def name(self) -> str:
        return f"{self.panel_name}, {self.method.name}, seed {self.seed}"

    @property
    def key(self) -> str:
        """Hash of the run's settings: two points with one key would be the same run.

        Only of what differs from a plain `RunConfig`, so that finished runs keep their names when a later version of
        this package brings another setting.
        """
        plain, changed = to_dict(RunConfig()), {}
        for name, value in to_dict(self.config).items():
            if isinstance(value, dict):
                value = {key: item for key, item in value.items() if item != plain[name][key]}
            if value not in ({}, plain[name]):
                changed[name] = value
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        """The run folder's path inside the study's: legible, and never two points' at once."""
        parts = [_slug(self.panel_name), _slug(self.method.name), f"seed{self.seed}", self.key]
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Study:
    """Many runs that answer one question.

    Args:
        name: The study's name.
        base: A preset's name, or a `RunConfig`.
        variant: The preset's variant, e.g. "roli".
        settings: What all runs change in the base.
        axes: What else varies: axis -> label -> settings, e.g. ``{"data": {"MNIST": {"data.name": "mnist"}, ...}}``.
            Each combination of labels is a panel of its own.
        methods: What is compared within each panel.
        seeds: Seeds of each method; ``panel_seeds`` says which panels have others (label of an axis -> seeds).
        measure: How every point is measured; on held-out images, so that choosing among points costs no test image.
        confirm: How each family's non-dominated points are measured in the end, on another split than ``measure`` has
            (unless each family has one method, so that none is chosen); or None.
        confirm_seeds: Only the first so many seeds of each chosen method get the final measurement; None: all.
        question: What the study asks, for the report's first paragraph.
        extra: Further sections of the report, made from the study, its records and the report's folder, into which it
            may write figures.
    """

    name: str
    methods: Sequence[Method]
    base: str | RunConfig = "quickstart"
    variant: str | None = None
    settings: Settings = field(default_factory=dict)
    axes: Mapping[str, Mapping[str, Settings]] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    panel_seeds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    measure: Measurement = Measurement(("clean", "apgd-ce", "t-apgd-dlr"), split="validation", limit=200)
    confirm: Measurement | None = Measurement(("clean", "autoattack"), audit=True)
    confirm_seeds: int | None = None
    question: str = ""
    extra: Callable[[Study, Sequence[Record], Path], list[Section]] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"name should be of letters, digits, _, . and -. Found name = {self.name!r}.")
        if not self.methods:
            raise ValueError("methods is empty.")
        names = [method.name for method in self.methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"methods should have different names. Found {', '.join(twice)} more than once.")
        for name, seeds in (("seeds", self.seeds), *((f"panel_seeds[{k!r}]", v) for k, v in self.panel_seeds.items())):
            _check_seeds(name, seeds)
        labels = {label for axis in self.axes.values() for label in axis}
        unknown = sorted(set(self.panel_seeds) - labels)
        if unknown:
            raise ValueError(f"panel_seeds should name labels of the axes. Found {', '.join(unknown)}.")
        if self.confirm_seeds is not None and self.confirm_seeds < 1:
            raise ValueError(
                f"confirm_seeds should be at least 1 or None. Found confirm_seeds = {self.confirm_seeds!r}."
            )
        self.points()  # says now what is wrong with any of the runs
        if self.confirm is not None and self.confirm.split == self.measure.split:
            self._check_nothing_is_chosen()

    def points(self) -> list[Point]:
        """All runs, in the order in which they are started: seed by seed, so that whole panels appear early.

        Raises:
            ValueError: If the settings of a point make no run; names the point and all that is wrong with it.
        """
        base = self.base if isinstance(self.base, RunConfig) else get_preset(self.base, self.variant)
        base = apply_settings(base, self.settings)
        found = []
        for panel, settings in self.panels():
            seeds = self.seeds_of(panel)
            for seed, method in itertools.product(seeds, self.methods):
                try:
                    config = apply_settings(base, {**settings, **method.settings, "seed": seed})
                except ValueError as error:
                    name = f"{', '.join(panel.values()) or 'all'}, {method.name}, seed {seed}"
                    raise ValueError(f"{self.name}: {name}: {error}") from error
                # What is measured is the study's matter, and the test images stay unseen until the end.
                config = apply_settings(config, {"evaluation.attacks": ()})
                found.append((seeds.index(seed), Point(panel, method, seed, config)))
        return [point for _, point in sorted(found, key=lambda item: item[0])]

    def seeds_of(self, panel: Mapping[str, str]) -> Sequence[int]:
        """The seeds of a panel's methods.

        Args:
            panel: One label for each axis.
        """
        return next((self.panel_seeds[label] for label in panel.values() if label in self.panel_seeds), self.seeds)

    def repeated(self) -> dict[tuple[str, str], str]:
        """Which methods are another one's training under a second name: CA-AT with gamma 1 is Vanilla(0).

        Returns:
            (panel's name, method's name) -> name of the method that it repeats. Of those that train alike the one
            called vanilla repeats none, else the first.
        """
        groups: dict[tuple[str, str], dict[str, RunConfig]] = {}
        for point in self.points():
            trained = to_dict(_plain_form(dataclasses.replace(point.config, seed=0)))
            key = (point.panel_name, json.dumps(trained, sort_keys=True))
            groups.setdefault(key, {}).setdefault(point.method.name, point.config)
        found = {}
        for (panel, _), methods in groups.items():
            kept = min(methods, key=lambda name: methods[name].surgery.name != "vanilla")
            found |= {(panel, name): kept for name in methods if name != kept}
        return found

    def _check_nothing_is_chosen(self) -> None:
        """A figure is too good where it decided that it would be shown: of one split, nothing may be chosen."""
        repeated = self.repeated()
        for panel, _ in self.panels():
            name = ", ".join(panel.values()) or "all"
            families = [method.family for method in self.methods if (name, method.name) not in repeated]
            several = next((family for family in families if families.count(family) > 1), None)
            if several is not None:
                raise ValueError(
                    "measure and confirm should have different splits where methods are chosen, or be judged by what "
                    f"they were chosen by. Found split = {self.measure.split!r} for both, and several methods of "
                    f"{several}. Let measure have the validation split, or leave confirm out (None)."
                )

    def panels(self) -> list[tuple[dict[str, str], dict[str, Any]]]:
        """Each combination of the axes' labels with its settings; one without axes."""
        found = []
        for labels in itertools.product(*self.axes.values()):
            panel = dict(zip(self.axes, labels, strict=True))
            settings: dict[str, Any] = {}
            for axis, label in panel.items():
                settings |= self.axes[axis][label]
            found.append((panel, settings))
        return found


def apply_settings(config: RunConfig, settings: Settings) -> RunConfig:
    """The run with other settings; where one names another method, the old method's own parameters go.

    Raises:
        ValueError: For a name that no run has, or settings that make no run.
    """
    changed: dict[str, dict[str, Any]] = {}
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        part, _, key = name.rpartition(".")
        target = getattr(config, part, None) if part else config
        names = {f.name for f in dataclasses.fields(target)} if dataclasses.is_dataclass(target) else set()
        if key not in names or (not part and dataclasses.is_dataclass(getattr(config, key))):
            raise ValueError(f"settings should be dotted names of a run's settings. Found {name!r}.")
        if part:
            changed.setdefault(part, {})[key] = value
        else:
            plain[key] = value
    for part, key, table in METHOD_PARAMETERS:
        given = changed.get(part, {}).get(key)
        current = getattr(config, part)
        if given in table and given != getattr(current, key):
            changed[part] = {parameter: None for parameter in table[getattr(current, key)]} | changed[part]
    try:
        parts = {part: dataclasses.replace(getattr(config, part), **values) for part, values in changed.items()}
        return dataclasses.replace(config, **parts, **plain)
    except TypeError as error:  # the checks compare what was given, a word with a number
        raise ValueError(f"A setting has a value of the wrong type ({error}). Found {dict(settings)}.") from error


def _check_seeds(name: str, seeds: Any) -> None:
    """A seed twice would be one run counted twice."""
    whole = isinstance(seeds, Sequence) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{name} should be different whole numbers, e.g. (0, 1, 2). Found {seeds!r}.")


def _plain_form(config: RunConfig) -> RunConfig:
    """CA-AT with gamma 1 as what it is: the standard gradient alone, Vanilla(0)."""
    surgery = config.surgery
    limit = surgery.name == "ca-at" and surgery.gamma == 1 and surgery.rescale != "vanilla"
    if limit or (surgery.name == "vanilla" and surgery.lam == 0):
        alone = SurgeryConfig(name="vanilla", lam=0.0)
        return dataclasses.replace(config, surgery=alone, measure_conflict=True)
    return config


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", text.lower()).strip("_")[:80]  # a file's name has at most 255 letters

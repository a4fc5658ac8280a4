"""What a study's runs were trained with: every setting once, by what has it in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from robust_peft.config import to_dict
from robust_peft.studies.records import Record
from robust_peft.studies.report_blocks import Block, Items, Section, Table
from robust_peft.studies.report_origin import descriptions
from robust_peft.studies.statistics import panel_name
from robust_peft.studies.study import Study

Parts = dict[str, dict[str, Any]]
"""Part of a run's settings -> name -> value; settings of no part are under ""."""


@dataclass(frozen=True)
class TrainedWith:
    """The settings of a study's runs; those that are None mean nothing for their run and are left out.

    Attributes:
        common: Settings of all runs.
        by_panel: Panel -> settings in which panels differ.
        by_method: Method -> settings in which methods differ.
        by_both: "panel, method" -> settings of a method that are not the same in every panel.
    """

    common: Parts
    by_panel: dict[str, Parts]
    by_method: dict[str, Parts]
    by_both: dict[str, Parts]


def trained_with(study: Study) -> TrainedWith:
    """What the study's points are trained with, but for the seed. How they are measured is the measurements' matter."""
    points = {(point.panel_name, point.method.name): _flat(to_dict(point.config)) for point in study.points()}
    panels, methods = (list(dict.fromkeys(key[place] for key in points)) for place in (0, 1))
    found = TrainedWith({}, {panel: {} for panel in panels}, {method: {} for method in methods}, {})
    for name in next(iter(points.values())):
        values = {key: settings[name] for key, settings in points.items()}
        in_panel = {panel: [value for key, value in values.items() if key[0] == panel] for panel in panels}
        of_method = {method: [value for key, value in values.items() if key[1] == method] for method in methods}
        if _equal(list(values.values())):
            _put(found.common, name, next(iter(values.values())))
        elif all(_equal(of_panel) for of_panel in in_panel.values()):
            for panel, of_panel in in_panel.items():
                _put(found.by_panel[panel], name, of_panel[0])
        elif all(_equal(everywhere) for everywhere in of_method.values()):
            for method, everywhere in of_method.items():
                _put(found.by_method[method], name, everywhere[0])
        else:
            for key, value in values.items():
                _put(found.by_both.setdefault(", ".join(key), {}), name, value)
    return found


def training_section(study: Study, records: Sequence[Record]) -> Section:
    """Every setting of the runs, and on how many images they were trained."""
    found = trained_with(study)
    base = f"the preset {study.base}" if isinstance(study.base, str) else "settings of the study's own"
    variant = f" ({study.variant})" if isinstance(study.base, str) and study.variant else ""
    blocks: list[Block] = []
    if images := _images(records):
        blocks.append(Items(images))
    rows = [("all runs", part or "run", _words(settings)) for part, settings in found.common.items()]
    for of, parts in (*found.by_panel.items(), *found.by_method.items(), *found.by_both.items()):
        if parts:
            rows.append((of, ", ".join(part or "run" for part in parts), "; ".join(map(_words, parts.values()))))
    caption = f"Settings of the training: {base}{variant}, with the study's changes. What has no meaning is left out."
    return Section("What was trained", (*blocks, Table(caption, ("of", "part", "settings"), tuple(rows))))


def _images(records: Sequence[Record]) -> tuple[str, ...]:
    """Panel by panel the numbers of images that its runs found."""
    found: dict[str, dict[str, None]] = {}
    described = descriptions(records)
    for record in records:
        images = described.get(record.folder, {}).get("images")
        if images:
            said = ", ".join(f"{count:,} for {part}" for part, count in images.items())
            found.setdefault(panel_name(record), {})[said] = None
    return tuple(f"{panel}, images: {' or '.join(said)}." for panel, said in found.items())


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_word(value)}" for name, value in settings.items())


def _word(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _flat(config: dict[str, Any]) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= {(name, key): item for key, item in value.items()}
        else:
            found["", name] = value
    return {key: value for key, value in found.items() if key != ("", "seed") and key[0] != "evaluation"}


def _equal(values: list[Any]) -> bool:
    return all(value == values[0] for value in values)


def _put(parts: Parts, name: tuple[str, str], value: Any) -> None:
    if value not in (None, [], ()):
        parts.setdefault(name[0], {})[name[1]] = value

"""From a config to a finished run."""

from __future__ import annotations

import copy
import logging
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from robust_peft import surgery as surgeries
from robust_peft.adapters import attach, find_head
from robust_peft.attacks import check_attack_name
from robust_peft.config import RunConfig, to_dict
from robust_peft.data import evaluation_loader, train_loader
from robust_peft.evaluation import evaluate
from robust_peft.files import write_json, write_text
from robust_peft.losses import make_loss
from robust_peft.models.checkpoints import fingerprint
from robust_peft.processes import on_main_or_raise, process_state
from robust_peft.runs.card import card
from robust_peft.runs.folder import (
    ADAPTER_FOLDER,
    EVALUATION_FOLDER,
    FULL_WEIGHTS,
    PROBE_FOLDER,
    adapter_file,
    check_folder,
    check_same_start,
    claimed,
    clear,
    description_of,
    save_whole,
)
from robust_peft.runs.parts import (
    adapter_method,
    build_backbone,
    initialise_head,
    load_data,
    loader_workers,
    make_augmentation,
    make_threat,
    make_training_attack,
    prepare_data,
    resolve_image_size,
)
from robust_peft.runs.result import RunResult
from robust_peft.training import Trainer
from robust_peft.training.state import STATE_FILE

logger = logging.getLogger("robust_peft")


def run(
    config: RunConfig,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    time_limit: float | None = None,
    progress: bool = True,
) -> RunResult:
    """Train, save, evaluate, and write the run folder.

    Args:
        config: The whole run.
        output: The run folder; made if it does not exist.
        resume: Go on with the unfinished run in ``output``; its config must be this one.
        overwrite: Remove the run in ``output`` first.
        time_limit: Seconds after which training stops cleanly; ``resume`` goes on.
        progress: Whether to show progress.

    Raises:
        FileExistsError: If ``output`` holds a run and neither ``resume`` nor ``overwrite`` is given, holds something
            else, or another process writes in it.
        FileNotFoundError: If there is no run to resume, or a file that the config names does not exist.
        ValueError: If the run to resume was started with other settings, or data and config do not fit.
    """
    folder = Path(output)
    for name in config.evaluation.attacks:
        check_attack_name(name, config.threat.norm)  # now, not after hours of training
    started = time.monotonic()

    def left() -> float | None:
        return None if time_limit is None else time_limit - (time.monotonic() - started)

    state = process_state()
    with claimed(folder) if state.is_main_process else nullcontext():
        on_main_or_raise(lambda: check_folder(folder, config, resume, overwrite))
        splits = load_data(config.data)
        backbone = build_backbone(config, len(splits.classes))
        image_size = resolve_image_size(config.data, backbone, splits)
        workers = loader_workers(config.data, splits, state.num_processes)
        splits = prepare_data(config, splits, image_size)
        augment = make_augmentation(config.data, splits.train)
        if splits.test is None and config.evaluation.attacks and state.is_main_process:
            logger.warning("%s brings no test images: nothing will be evaluated at the end.", config.data.name)
        going_on = resume and (folder / STATE_FILE).is_file()
        base_hash = fingerprint(backbone, leave_out=find_head(backbone))
        if resume:
            check_same_start(folder, None if config.adapter.name == "full" else base_hash, splits.classes)
        else:
            attach(copy.deepcopy(backbone), adapter_method(config.adapter, backbone))
            if state.is_main_process:
                clear(folder)  # not earlier: a mistake in the config must not cost the run that was here
                write_json(
                    folder / "config.json", description_of(config, backbone, splits, image_size, state, base_hash)
                )
        if not going_on:
            probe = initialise_head(
                backbone, config, splits, augment, workers, progress, output=folder / PROBE_FOLDER, time_limit=left()
            )
            if probe is not None and not probe.finished:
                return RunResult(folder, False, backbone, probe, None, 0, 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # adapters start from random numbers too
            model = attach(backbone, adapter_method(config.adapter, backbone))
        trainer = Trainer(
            model,
            attack=make_training_attack(config),
            loss=make_loss(config.loss.name, **config.loss.parameters()),
            surgery=surgeries.make_surgery(config.surgery.name, **config.surgery.parameters()),
            optim=config.optim,
            validation=config.validation,
            augment=augment,
            conflict_params=config.surgery.conflict_params,
            scope=config.surgery.scope,
            measure_conflict=config.measure_conflict,
            precision=config.precision,
            compile=config.compile,
            gradient_checkpointing=config.gradient_checkpointing,
            channels_last=config.channels_last,
            seed=config.seed,
            output=folder,
            save_every_steps=config.save_every_steps,
            log_with=config.track_with,
            settings=to_dict(config),
            progress=progress,
        )
        validation = splits.validation
        fit = trainer.fit(
            train_loader(splits.train, config.data.batch_size, seed=config.seed, workers=workers),
            None
            if validation is None
            else evaluation_loader(validation, config.evaluation.batch_size, workers=workers),
            resume=going_on,
            time_limit=left(),
        )
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not fit.finished:
            return RunResult(folder, False, model, fit, None, trainable, 0)
        where = folder if config.adapter.name == "full" else folder / ADAPTER_FOLDER
        if state.is_main_process:
            save_whole(model, where)
        state.wait_for_everyone()
        size = (where / FULL_WEIGHTS if config.adapter.name == "full" else adapter_file(folder)).stat().st_size
        report = None
        if splits.test is not None and config.evaluation.attacks:
            report = evaluate(
                model,
                splits.test,
                [make_threat(config)],
                config.evaluation.attacks,
                batch_size=config.evaluation.batch_size,
                limit=config.evaluation.limit,
                each=config.evaluation.each,
                precision=config.evaluation.precision,
                seed=config.seed,
                output=folder / EVALUATION_FOLDER,
                progress=progress and state.is_main_process,
            )
        result = RunResult(folder, True, model, fit, report, trainable, size)
        if state.is_main_process:
            training = {"seconds": fit.seconds, "trainable_parameters": trainable, "bytes_on_disk": size}
            evaluation = {} if report is None else report.to_dict()
            write_json(folder / "evaluation.json", {**evaluation, "training": training})
            write_text(folder / "README.md", card(config, result))
        state.wait_for_everyone()
        return result

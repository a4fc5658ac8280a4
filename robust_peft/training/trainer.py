"""The training loop: epochs, precision, processes, validation, saving and exact resume."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.tracking import GeneralTracker, get_available_trackers
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from robust_peft import keyed_random
from robust_peft import surgery as surgeries
from robust_peft.attacks import PGD, Solver
from robust_peft.config import OptimConfig, ValidationConfig, to_dict
from robust_peft.losses import Loss, make_loss
from robust_peft.models.reduced import fast_in
from robust_peft.processes import on_cpu
from robust_peft.training.checkpointing import block_names, checkpointed_blocks
from robust_peft.training.drop_path import KeyedDropPaths, has_dropout
from robust_peft.training.gradients import GradientPair, Surgery
from robust_peft.training.optim import MovingAverage, make_optimizer, make_schedule
from robust_peft.training.precision import DTYPES, autocast_for, resolve_precision
from robust_peft.training.progress import Progress
from robust_peft.training.state import STATE_FILE, Checkpoint, MetricsLog, RunState, restore
from robust_peft.training.step import AUGMENTATION, EXTRAS, Batch, add_gradients
from robust_peft.training.update import Update
from robust_peft.training.validation import validate

Augmentation = Callable[[Tensor, Tensor], Tensor]

# So many optimizer steps in a row with non-finite gradients end the run. float16 starts with a loss scale that is meant
# to overflow until it has come down, one halving a step.
MOST_SKIPPED = {"fp32": 5, "bf16": 5, "fp16": 25}


@dataclass
class FitResult:
    """How `Trainer.fit` ended."""

    finished: bool
    """False where the time limit came first; `Trainer.fit` with ``resume=True`` goes on."""
    steps: int
    """Optimizer steps taken in all."""
    seconds: float
    """Time spent training in all, earlier pieces included."""
    best: dict[str, float] | None = None
    """The validation record of the weights that were kept, or None without validation."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """The records of ``metrics.jsonl``."""


class Trainer:
    """Adversarial training of whatever in the model is trainable, with the surgery of one's choice.

    Args:
        model: Pixels of shape `[B, C, H, W]` in [0, 1] to logits of shape `[B, K]`.
        attack: The inner maximisation. Where it names no objective, the loss's own is taken.
        loss: "ce", "trades", "mart", "clp" or a `robust_peft.losses.Loss`.
        surgery: Gramian to weights, e.g. `robust_peft.surgery.ConflictAware`.
        optim: Optimizer, schedule, epochs, accumulation, clipping, moving average.
        validation: How often and how validation is done, and which weights are kept.
        augment: ``augment(images, keys) -> images`` on the device, e.g. `robust_peft.data.CropFlip`.
        conflict_params: "all": the angle is measured on all trainable parameters; "adapters": not on the head, which
            gets the same weights.
        scope: "all": one flattened vector; "tensor": the rule is applied to each parameter tensor by itself.
        measure_conflict: False spares vanilla the second backward pass (and the log its cosine).
        precision: "auto", "fp32", "bf16" or "fp16" (autocast; parameters and optimizer stay in their dtype). "auto"
            is what ``accelerate launch --mixed_precision`` says, else bf16 where the hardware has it.
        compile: Run the model through torch.compile.
        gradient_checkpointing: Keep only each transformer block's input for the backward pass: much less memory, a
            third more time.
        channels_last: Keep images and convolutions' weights in that memory format, which is faster for ConvNets.
        seed: Seed of the order of the samples and of every random draw.
        output: Run folder for metrics and state; None writes nothing.
        save_every_steps: Optimizer steps between saved states; None: once an epoch.
        log_with: Trackers by their Accelerate names, or trackers of one's own (`accelerate.tracking.GeneralTracker`).
        settings: What a resumed run must agree with besides these arguments, as plain JSON values.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: For settings that do not go together; the message says which.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        attack: Solver,
        loss: str | Loss = "ce",
        surgery: Surgery | None = None,
        optim: OptimConfig | None = None,
        validation: ValidationConfig | None = None,
        augment: Augmentation | None = None,
        conflict_params: str = "all",
        scope: str = "all",
        measure_conflict: bool = True,
        precision: str = "auto",
        compile: bool = False,
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        seed: int = 0,
        output: str | Path | None = None,
        save_every_steps: int | None = None,
        log_with: tuple[str | GeneralTracker, ...] = (),
        settings: dict[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.attack = attack
        self.loss = make_loss(loss) if isinstance(loss, str) else loss
        self.surgery = surgery if surgery is not None else surgeries.ConflictAware()
        self.optim = optim or OptimConfig()
        self.validation = validation or ValidationConfig()
        self.optim.check()
        self.validation.check()
        self.augment = augment
        self.scope = scope
        self.seed = seed
        self.output = None if output is None else Path(output)
        self.save_every_steps = save_every_steps
        self.show_progress = progress
        if conflict_params not in ("all", "adapters"):
            raise ValueError(f"conflict_params should be all or adapters. Found conflict_params = {conflict_params!r}.")
        if scope not in ("all", "tensor"):
            raise ValueError(f"scope should be all or tensor. Found scope = {scope!r}.")
        self.loss_weights: tuple[float, float] | None = None
        if not measure_conflict:
            if not isinstance(self.surgery, surgeries.Vanilla):
                raise ValueError(f"measure_conflict=False is for Vanilla alone. Found {self.surgery!r}.")
            self.loss_weights = (1 - self.surgery.lam, self.surgery.lam)
        objective = attack.objective or self.loss.inner_objective
        checked: Any = attack
        replace(checked, objective=objective)  # raises where attack and objective do not go together

        known = [str(tracker) for tracker in get_available_trackers()]
        missing = [tracker for tracker in log_with if isinstance(tracker, str) and tracker not in known]
        if missing:  # Accelerate would go on without them
            raise ValueError(
                f"log_with: {', '.join(missing)} is not installed. Installed: {', '.join(known) or 'none'}."
            )

        # The loop shards and seeds through Accelerate; autocast is ours, so that one process can hold trainers of
        # different precision (Accelerate's state is one for the whole process).
        self.accelerator = Accelerator(
            # Without this, processes that torchrun starts on a machine without a GPU would each train alone.
            cpu=on_cpu(),
            log_with=list(log_with) or None,
            project_dir=str(self.output) if self.output is not None else None,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed, even_batches=False),
        )
        if int(os.environ.get("WORLD_SIZE", 1)) != self.accelerator.num_processes:
            raise ValueError(
                f"{os.environ['WORLD_SIZE']} processes were launched, but Accelerate joined "
                f"{self.accelerator.num_processes} of them; each would train alone."
            )
        if self.accelerator.distributed_type.name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise ValueError(
                f"{self.accelerator.distributed_type.name} is not supported: the surgery needs whole gradients on "
                "every rank. Use plain data parallelism (MULTI_GPU, MULTI_CPU)."
            )
        self.log_with = tuple(log_with)
        self.device = self.accelerator.device
        self.precision = resolve_precision(precision, self.device)
        model.to(self.device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            model.to(memory_format=torch.channels_last)
        self.forward_model: nn.Module = torch.compile(model) if compile else model  # type: ignore[assignment]
        self._drop_paths = KeyedDropPaths(model)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            block_names(model)  # raises where there are none
        self.trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        # A float64 model is trained in float64 from the pixels on.
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for _, p in self.trainable) else torch.float32
        self.settings = {
            "attack": repr(attack),
            "loss": repr(self.loss),
            "surgery": repr(self.surgery),
            "optim": to_dict(self.optim),
            "validation": to_dict(self.validation),
            "augment": repr(augment),
            "conflict_params": conflict_params,
            "scope": scope,
            "measure_conflict": measure_conflict,
            "precision": self.precision,
            "seed": seed,
        } | (settings or {})
        adapters_only = conflict_params == "adapters"
        self.pair = GradientPair(
            self.trainable,
            # peft keeps the trained copy of the head under this name; everything else it trains is adapter.
            measured=(lambda name: "modules_to_save" not in name) if adapters_only else None,
            rows=2 if self.loss_weights is None else 1,
            extras=len(EXTRAS),
        )
        self._share_start()

    # --- the loop ---

    def fit(
        self,
        train_loader: DataLoader,
        validation: Iterable | None = None,
        *,
        resume: bool = False,
        time_limit: float | None = None,
    ) -> FitResult:
        """Train to the end, or to the time limit.

        Args:
            train_loader: Batches ``(images, labels)`` or ``(images, labels, indices)``: images uint8 or floats in
                [0, 1] of shape `[B, C, H, W]`, labels int64 of shape `[B]`. With indices, each sample's random draws
                belong to it; without, to its place in the joined batch. Several processes need ``drop_last=True``.
            validation: The same for the validation images (all of them on every process), or None.
            resume: Go on from the state in ``output``.
            time_limit: Seconds after which the run stops cleanly at the next step and saves its state.

        Raises:
            ValueError: For images out of range, labels outside the classes, an empty loader, or a state that was
                saved under other settings.
            FloatingPointError: If gradients stay non-finite.
        """
        started = time.monotonic()
        loader = self._prepare(train_loader)
        batches = len(loader)
        accumulation = self.optim.accumulation
        world = self.accelerator.num_processes
        steps_per_epoch = math.ceil(batches / accumulation)
        optimizer = make_optimizer(self.trainable, self.optim)
        schedule = make_schedule(optimizer, self.optim, steps_per_epoch)
        parameters = [p for _, p in self.trainable]
        average = None
        if self.optim.ema_decay is not None:
            average = MovingAverage([*parameters, *self._running_statistics().values()], self.optim.ema_decay)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        run = RunState()
        if self.output is not None and not resume and (self.output / STATE_FILE).is_file():
            raise FileExistsError(f"{self.output} holds the state of a run. Go on with resume=True, or name another.")
        checkpoint = Checkpoint(self.output, self.settings, self.trained_tensors, optimizer, schedule, scaler, average)
        if resume:
            checkpoint.load(run)
        if self.accelerator.is_main_process:
            run.log = MetricsLog(self.output, keep=run.records if resume else None)
        update = Update(
            self.pair,
            self.surgery,
            optimizer,
            schedule,
            scaler,
            scope=self.scope,
            clip_norm=self.optim.clip_norm,
            match_change=self.optim.match_change,
            all_reduce=self._all_reduce if world > 1 else None,
        )
        if self.log_with:
            self.accelerator.init_trackers("robust_peft", config=_flat(self.settings))
        self._num_classes = self._count_classes(loader)
        self._draws_dropout = has_dropout(self.model)
        before_this_piece = run.seconds
        stopped = False

        def save() -> None:
            run.seconds = before_this_piece + time.monotonic() - started
            if self.accelerator.is_main_process:
                checkpoint.save(run)

        running = ExitStack()
        if self.precision != "fp32":
            running.enter_context(fast_in(DTYPES[self.precision], self.device, self.model))
        if self.gradient_checkpointing:
            running.enter_context(checkpointed_blocks(self.model))
        with (
            running,
            self._drop_paths,
            Progress(self.optim.epochs * steps_per_epoch, run.step, self._shows()) as progress,
        ):
            while run.epoch < self.optim.epochs and not stopped:
                loader.set_epoch(run.epoch)
                set_epoch = getattr(train_loader.dataset, "set_epoch", None)
                if set_epoch is not None:
                    set_epoch(run.epoch)  # random crops are drawn where pictures are decoded
                source: Any = skip_first_batches(loader, run.batch) if run.batch else loader
                # skip_first_batches makes a new loader, which would start at epoch 0 again.
                source.set_epoch(run.epoch)
                self._train_mode()
                self.pair.clear()
                held: list[Batch] = []
                step_started = time.monotonic()
                for batch in source:
                    held.append(self._place(batch, run.step, len(held)))
                    run.batch += 1
                    if len(held) < accumulation and run.batch < batches:
                        continue
                    if self._draws_dropout:
                        # Ordinary dropout draws from torch's generator; seeded here, a resumed run draws the same.
                        torch.manual_seed(self.seed + run.step * world + self.accelerator.process_index)
                    for micro in held:
                        add_gradients(
                            self.pair,
                            micro,
                            model=self.forward_model,
                            attack=self.attack,
                            loss=self.loss,
                            loss_weights=self.loss_weights,
                            autocast=self._autocast,
                            scale=scaler.scale,
                            seed_dropout=self._drop_paths.set_keys,
                        )
                    held.clear()
                    late = time_limit is not None and time.monotonic() - started > time_limit
                    self.pair.extras[EXTRAS.index("stop")] = float(late)
                    record = update(run)
                    self._check_finite(run, record)
                    if average is not None:
                        average.update()
                    now = time.monotonic()
                    record["images_per_second"] = record["images"] / (now - step_started)
                    step_started = now
                    self._log(run, record)
                    progress.step(record)
                    self.pair.clear()
                    run.step += 1
                    stopped = record["stop"]
                    if run.batch >= batches:
                        break
                    if stopped or (self.save_every_steps and run.step % self.save_every_steps == 0):
                        save()
                    if stopped:
                        break
                if run.batch >= batches:
                    run.epoch, run.batch = run.epoch + 1, 0
                    last = run.epoch == self.optim.epochs
                    self._share_running_statistics()
                    every = self.validation.every
                    if validation is not None and every and (last or run.epoch % every == 0):
                        self._validate(run, validation, average, progress)
                    save()
        finished = run.epoch == self.optim.epochs
        if finished:
            self._keep(run, average)
        self.model.eval()
        if self.log_with:
            for tracker in self.accelerator.trackers:  # end_training() would also part the processes
                tracker.finish()
        return FitResult(finished, run.step, run.seconds, run.best if finished else None, run.log.records)

    def _train_mode(self) -> None:
        """Train mode, but for normalisations of the frozen backbone: their running statistics are part of it."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                if not any(parameter.requires_grad for parameter in module.parameters()):
                    module.eval()

    def _share_running_statistics(self) -> None:
        """Average over ranks what each rank's batches made of trained BatchNorms' running statistics."""
        if self.accelerator.num_processes == 1:
            return
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats:
                for buffer in (module.running_mean, module.running_var):
                    if buffer is not None:
                        buffer.copy_(self._all_reduce(buffer) / self.accelerator.num_processes)

    def _check_finite(self, run: RunState, record: dict[str, Any]) -> None:
        if run.skipped_in_a_row >= MOST_SKIPPED[self.precision]:
            where = "none was saved" if self.output is None else f"the last saved one is in {self.output / 'state'}"
            raise FloatingPointError(
                f"Gradients of loss {self.loss.name!r} were not finite in {run.skipped_in_a_row} steps in a row, up to "
                f"step {run.step} (clean loss {record['clean_loss']:g}, adversarial loss {record['adv_loss']:g}). Try "
                f"a lower learning rate or precision fp32. State: {where}."
            )

    # --- data ---

    def _prepare(self, loader: DataLoader) -> Any:
        world = self.accelerator.num_processes
        if world > 1 and not loader.drop_last:
            raise ValueError("With several processes the training loader needs drop_last=True: every rank must step.")
        known = (RandomSampler, SequentialSampler)
        for part, kinds in ((loader.sampler, known), (loader.batch_sampler, (BatchSampler,))):
            exact = world > 1 or self.output is not None
            if exact and not (type(part) in kinds or hasattr(part, "set_epoch")):
                raise ValueError(
                    f"{type(part).__name__} cannot be shared between processes or resumed: its order is not a function "
                    "of seed and epoch. Take shuffle=True, or give it a method set_epoch."
                )
        dataset: Any = loader.dataset
        wrapped = False
        while hasattr(dataset, "dataset"):
            dataset, wrapped = dataset.dataset, True
        if hasattr(dataset, "set_epoch") and (wrapped or loader.persistent_workers):
            raise ValueError(
                "Random crops are drawn anew each epoch, which workers that stay alive and a Subset do not see: take "
                "persistent_workers=False, and subset(indices) of the prepared images in place of Subset."
            )
        prepared = self.accelerator.prepare_data_loader(loader, device_placement=False)
        if len(prepared) == 0:
            raise ValueError(f"The training loader is empty: fewer samples than {world} batches of its size.")
        return prepared

    def _place(self, batch: Any, step: int, micro: int) -> Batch:
        """Check a batch while it is still on the host, then move it to the device."""
        images, labels, *rest = batch
        if images.is_floating_point():
            self.attack.threat.check_images(images)
        elif images.dtype != torch.uint8:
            raise ValueError(f"images should be uint8 or floating point in [0, 1]. Found {images.dtype}.")
        if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < self._num_classes):
            raise ValueError(
                f"labels should be in 0..{self._num_classes - 1}, the classes of the model. "
                f"Found labels from {int(labels.min())} to {int(labels.max())}."
            )
        if rest:
            indices = rest[0]
        else:
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
            indices = torch.arange(len(images)) + (micro * world + rank) * len(images)
        keys = keyed_random.sample_keys(self.seed, step, indices.to(self.device, non_blocking=True))
        images = images.to(self.device, non_blocking=True)
        images = images.to(self.dtype) / 255 if images.dtype == torch.uint8 else images.to(self.dtype)
        if self.augment is not None:
            images = self.augment(images, keyed_random.derive(keys, AUGMENTATION))
        images = images.contiguous(memory_format=self.memory_format)
        return Batch(images, labels.to(self.device, non_blocking=True), keys)

    @torch.no_grad()
    def _count_classes(self, loader: Any) -> int:
        """How many logits the model gives, seen on one image."""
        images = loader.dataset[0][0]
        images = torch.as_tensor(images)[None].to(self.device)
        was_training = self.model.training
        self.model.eval()
        scale = 255 if images.dtype == torch.uint8 else 1
        count = self.model(images.to(self.dtype) / scale).shape[1]
        self.model.train(was_training)
        return count

    # --- processes ---

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")  # type: ignore[return-value]

    def _share_start(self) -> None:
        """Every rank starts from rank 0's parameters and buffers."""
        if self.accelerator.num_processes > 1:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                torch.distributed.broadcast(tensor.detach(), src=0)

    def _autocast(self) -> AbstractContextManager:
        return autocast_for(self.precision, self.device) if self.precision != "fp32" else nullcontext()

    def _shows(self) -> bool:
        return self.show_progress and self.accelerator.is_local_main_process

    # --- records ---

    def _log(self, run: RunState, record: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        run.log.add({k: v for k, v in record.items() if k != "stop"})
        if self.log_with:
            numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
            self.accelerator.log(numbers, step=record["step"])

    def _validate(self, run: RunState, images: Iterable, average: MovingAverage | None, progress: Progress) -> None:
        attack = PGD(self.attack.threat, steps=self.validation.steps)
        if average is not None:
            average.swap()
        record = validate(self.model, images, attack, self.device, self._autocast, self.accelerator, self.seed)
        if average is not None:
            average.swap()
        record = {"kind": "validation", "epoch": run.epoch, "step": run.step, **record}
        record["mean_accuracy"] = (record["standard_accuracy"] + record["adversarial_accuracy"]) / 2
        best = run.best is None or record[self.validation.metric] > run.best[self.validation.metric]
        if self.validation.keep == "last" or best:
            run.best = record
            if self.validation.keep == "best":
                kept = self.trained_tensors() if average is None else self._averaged_tensors(average)
                run.best_tensors = {name: tensor.clone() for name, tensor in kept.items()}
        self._log(run, record)
        progress.validation(record)

    # --- what is trained ---

    def trained_tensors(self) -> dict[str, Tensor]:
        """What training changes: trainable parameters, and buffers that a checkpoint keeps."""
        kept = set(self.model.state_dict())
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if name in kept}
        return {name: p.detach() for name, p in self.trainable} | buffers

    def _running_statistics(self) -> dict[str, Tensor]:
        """Running means and variances of BatchNorms, by name."""
        found = {}
        for prefix, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                found |= {f"{prefix}.{name}": getattr(module, name) for name in ("running_mean", "running_var")}
        return found

    def _averaged_tensors(self, average: MovingAverage) -> dict[str, Tensor]:
        names = [*(name for name, _ in self.trainable), *self._running_statistics()]
        return self.trained_tensors() | dict(zip(names, average.averages, strict=True))

    def _keep(self, run: RunState, average: MovingAverage | None) -> None:
        """Leave in the model what the run is to be judged by: best weights, the moving average, or the last ones."""
        if run.best_tensors is not None:
            restore(self.trained_tensors(), run.best_tensors)
        elif average is not None:
            restore(self.trained_tensors(), self._averaged_tensors(average))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return found

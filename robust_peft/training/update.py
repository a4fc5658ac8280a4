"""From the pair of gradients to the step of the optimizer, with a record of what the surgery saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robust_peft import surgery as surgeries
from robust_peft.training.gradients import GradientPair, Surgery
from robust_peft.training.matched_change import MatchedChange
from robust_peft.training.state import RunState
from robust_peft.training.step import EXTRAS


class Update:
    """Reduce over ranks, combine, clip, step: in this order, with one wait for the device (two with ``match_change``).

    Args:
        pair: Sums of per-sample gradients. With one row, that is the weighted loss's and there is no surgery.
        surgery: Gramian to weights.
        optimizer: Steps on what is written into ``.grad``.
        schedule: Stepped with it, also where a step is skipped.
        scaler: float16's loss scale; disabled otherwise.
        scope: "all" or "tensor".
        clip_norm: Longest update, or None.
        match_change: "vanilla": scale the change of the parameters as `MatchedChange` does; None: leave it as it is.
        all_reduce: Sums a tensor over ranks; None with one process.

    Raises:
        ValueError: If ``match_change`` finds one row in the pair.
    """

    def __init__(
        self,
        pair: GradientPair,
        surgery: Surgery,
        optimizer: Any,
        schedule: Any,
        scaler: Any,
        *,
        scope: str,
        clip_norm: float | None,
        match_change: str | None = None,
        all_reduce: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.pair, self.surgery = pair, surgery
        self.optimizer, self.schedule, self.scaler = optimizer, schedule, scaler
        self.scope, self.clip_norm, self.all_reduce = scope, clip_norm, all_reduce
        self.matched = None if match_change is None else MatchedChange(pair, optimizer)

    def __call__(self, run: RunState) -> dict[str, Any]:
        """Take the step that the pair holds the gradients of, count it in ``run``, and return its record."""
        pair, scale = self.pair, self.scaler.get_scale()
        pair.reduce(self.all_reduce)
        pair.rows.div_(pair.extras[0].clone())
        vanilla = None if self.matched is None else self.matched.gradient()
        measured = self._combine()
        norm = self._clip(pair.update, scale)
        sound = torch.isfinite(norm)
        if vanilla is not None:
            sound = sound & torch.isfinite(self._clip(vanilla, scale))
        asked = (sound, norm, *pair.extras, run.change_norm.to(norm.device), *measured)
        finite, norm_now, *rest = torch.stack([value.double() for value in asked]).tolist()  # the step's one wait

        before = pair.flat_parameters()
        change_scale: dict[str, float] = {}
        length = None
        if self.matched is not None and vanilla is not None:
            change_scale = {"change_scale": float("nan")}  # of a skipped step
            length = self.matched.measure(vanilla / scale, run) if finite else None
        pair.write()
        self._step(bool(finite), run)
        if self.matched is not None and length is not None:
            change_scale = {"change_scale": self.matched.scale(length)}
        rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        run.change_norm = (pair.flat_parameters() - before).norm()

        extras = dict(zip(EXTRAS, rest, strict=False))
        images = int(extras["count"])
        record: dict[str, Any] = {
            "kind": "train",
            "step": run.step,
            "epoch": run.epoch,
            "lr": rate,
            "images": images,
            "clean_loss": extras["clean_loss"] / images,
            "adv_loss": extras["adv_loss"] / images,
            "clean_correct": int(extras["clean_correct"]),
            "adv_correct": int(extras["adv_correct"]),
            "update_norm": norm_now / scale,
            "previous_change_norm": rest[len(EXTRAS)],
            "skipped": run.skipped,
            "stop": extras["stop"] > 0,
        }
        return record | change_scale | _unscaled(rest[len(EXTRAS) + 1 :], scale)

    def _clip(self, update: Tensor, scale: float) -> Tensor:
        """Shorten an update, and return the norm that it had."""
        norm = update.norm()
        if self.clip_norm is not None:
            # A norm that is not finite gives a factor of 0 or NaN; the step is skipped then.
            update.mul_((self.clip_norm * scale / norm).clamp(max=1.0))
        return norm

    def _combine(self) -> list[Tensor]:
        """Write the update into the pair; return what was measured on the way."""
        pair = self.pair
        if len(pair.rows) == 1:
            pair.update.copy_(pair.rows[0])
            return []
        gramian = pair.gramian(self.scope)
        weights = self.surgery(gramian)
        pair.combine(weights)
        whole = gramian.sum(dim=0) if self.scope == "tensor" else gramian
        measured = list(surgeries.conflict(whole))
        if weights.dim() == 1:
            flags = [surgeries.cancelled(whole, weights), surgeries.ascends_adv(whole, weights)]
            measured += [*weights, *flags]
        return measured

    def _step(self, finite: bool, run: RunState) -> None:
        """Step the optimizer, or skip where gradients are not finite; alike on every rank, as the gradients are."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)  # finds infinities, so that update() halves the scale
        if finite:
            self.scaler.step(self.optimizer)
            run.skipped_in_a_row = 0
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.step()  # without gradients it changes nothing; the schedule wants to see it called
            run.skipped += 1
            run.skipped_in_a_row += 1
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def _unscaled(measured: list[float], scale: float) -> dict[str, Any]:
    """The measured numbers by name, without float16's loss scale."""
    if not measured:
        return {}
    cos, mu, clean_norm, adv_norm, *others = measured
    named: dict[str, Any] = {"cos": cos, "mu": mu / scale**2}
    named |= {"clean_norm": clean_norm / scale, "adv_norm": adv_norm / scale}
    if others:
        # The clean weight is lambda* under CA-AT below the cone.
        named |= {"clean_weight": others[0], "adv_weight": others[1]}
        named |= {"cancelled": bool(others[2]), "ascends_adv": bool(others[3])}
    return named

"""Square: random search over square changes, which asks the model for its logits alone.

Andriushchenko, Croce, Flammarion and Hein 2020 (arXiv:1912.00049), Algorithms 1 to 3. Differs from the official
implementation in its randomness: there one window serves the whole batch, here each sample draws its own from its key,
so that a result does not depend on the batch; and the last possible position of a window is drawn too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from robust_peft import keyed_random
from robust_peft.attacks.victim import Confirm, as_victim, full_precision_logits
from robust_peft.objectives import margin
from robust_peft.threat import ThreatModel

BLOCK = 64  # iterations whose random numbers are drawn in one call
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of the changed share, in iterations of 10,000


@dataclass(frozen=True)
class Square:
    """Random search: a change that raises the margin, or fools the model, is kept.

    Args:
        threat: Norm, budget and box.
        queries: Images that the model is asked about after the first.
        p_init: Share of the pixels that a change covers in the beginning; the standard AutoAttack takes 0.8.
        restarts: Independent runs.
        rescale_schedule: Shrink the schedule, made for 10,000 queries, to ``queries``. The standard does not.
        early_stop: Whether a sample that is fooled leaves the batch. Without, it stays there with its image.

    Raises:
        ValueError: For a value out of range.
    """

    threat: ThreatModel
    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1
    rescale_schedule: bool = False
    early_stop: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.threat, ThreatModel):
            raise ValueError(f"threat should be a ThreatModel. Found threat = {self.threat!r}.")
        for name in ("queries", "restarts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} should be an integer of at least 1. Found {name} = {value!r}.")
        if not isinstance(self.p_init, (int, float)) or isinstance(self.p_init, bool) or not 0 < self.p_init <= 1:
            raise ValueError(f"p_init should be in (0, 1]. Found p_init = {self.p_init!r}.")

    def __str__(self) -> str:
        return f"Square-{self.queries}{f' x{self.restarts}' if self.restarts > 1 else ''} {self.threat}"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """Adversarial images. The model is asked in eval mode and left as it was; its gradients are not used.

        Args:
            model: Pixels of shape `[B, C, H, W]` in the threat's box to logits of shape `[B, K]`.
            images: Images of shape `[B, C, H, W]` in the box.
            labels: Labels of shape `[B]`, int64.
            keys: The samples' random keys of shape `[B]` (`robust_peft.keyed_random`). None: drawn from torch's
                generator.

        Returns:
            Images of the shape and dtype of ``images``, inside ball and box: one that fools the model where one was
            found, else the one with the highest margin.

        Raises:
            ValueError: If the images are not in the box.
        """
        self.threat.check_images(images)
        return self.perturb(model, images, labels, keys=keys)

    def perturb(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        keys: Tensor | None = None,
        confirm: Confirm | None = None,
    ) -> Tensor:
        """As calling the attack, without the check of the pixel range; ``confirm`` as in `attacks.victim`."""
        images = images.detach()
        result = self.threat.project(images, images).contiguous()
        if len(images) == 0:
            return result.clone()
        if keys is None:
            keys = keyed_random.fresh_keys(len(images), images.device)
        best_score = torch.full((len(images),), -torch.inf, device=images.device)
        fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        with as_victim(model), torch.no_grad():
            for restart in range(self.restarts):
                positions = torch.arange(len(images), device=images.device)
                if self.early_stop:
                    positions = positions[~fooled]
                if len(positions) == 0:
                    break
                self._run(
                    model, images, labels, keyed_random.derive(keys, restart), positions, confirm,
                    result, best_score, fooled,
                )  # fmt: skip
        return result

    def _run(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        positions: Tensor,
        confirm: Confirm | None,
        result: Tensor,
        best_score: Tensor,
        fooled: Tensor,
    ) -> None:
        """One run over the samples at ``positions`` of shape `[b]`; writes into the last three, of B rows."""
        clean, own_labels, own_keys = images[positions], labels[positions], keys[positions]
        candidate = self._first(clean, own_keys)
        current, score = candidate, torch.full((len(positions),), -torch.inf, device=images.device)
        done = torch.zeros(len(positions), dtype=torch.bool, device=images.device)
        draws = torch.empty(0)
        for query in range(self.queries + 1):
            if query:
                place = (query - 1) % BLOCK
                if place == 0:
                    count = min(BLOCK, self.queries - query + 1)
                    draws = keyed_random.uniform(
                        keyed_random.derive(own_keys, 1 + query // BLOCK),
                        (count, 5 + images.shape[1]),
                        _draw_dtype(images),
                    )
                candidate = self._change(current, clean, draws[:, place], self.window(query - 1, images.shape))
            logits = full_precision_logits(model, candidate)
            new_score = margin(logits, own_labels)
            # What is no number is wrong (it is no answer), and comes before any number.
            hit = (logits.argmax(dim=1) != own_labels) | ~logits.isfinite().all(dim=1)
            new_score = torch.where(new_score.isnan(), torch.inf, new_score).to(score.dtype)
            hit &= ~done
            if confirm is not None and bool(hit.any()):
                rows = hit.nonzero().squeeze(1)
                hit[rows] = confirm(candidate[rows], positions[rows])
            better = ((new_score > score) | hit) & ~done
            current = torch.where(better.reshape(-1, 1, 1, 1), candidate, current)
            score = torch.where(better, new_score, score)
            done |= hit
            if self.early_stop and bool(hit.any()):
                out = positions[hit]
                result[out], best_score[out], fooled[out] = current[hit], torch.inf, True
                stay = ~hit
                positions, clean, own_labels, own_keys = positions[stay], clean[stay], own_labels[stay], own_keys[stay]
                current, score, done = current[stay], score[stay], done[stay]
                draws = draws[stay] if query else draws
                if len(positions) == 0:
                    return
        score = torch.where(done, torch.inf, score)
        better = score > best_score[positions]
        result[positions[better]] = current[better]
        best_score[positions[better]] = score[better].to(best_score.dtype)
        fooled[positions] |= done

    def window(self, iteration: int, shape: torch.Size) -> int:
        """Side of the square that is changed in an iteration, counted from 0, of images of shape `[B, C, H, W]`."""
        counted = int(iteration / self.queries * 10000) if self.rescale_schedule else iteration
        share = self.p_init / 2 ** sum(counted > bound for bound in HALVINGS)
        height, width = shape[-2:]
        side = max(round(math.sqrt(share * height * width)), 1)
        if self.threat.norm == "l2":
            side = max(side, 3) | 1  # odd, so that its pyramid has a middle
        return min(side, height, width)

    def _first(self, clean: Tensor, keys: Tensor) -> Tensor:
        """The first image: vertical stripes at the ball's surface (L-inf), a grid of pyramids (L2)."""
        count, channels, height, width = clean.shape
        dtype = _draw_dtype(clean)
        if self.threat.norm == "linf":
            signs = keyed_random.uniform(keyed_random.derive(keys, 0), (channels, 1, width), dtype)
            return self.threat.project(clean + self.threat.eps * _sign(signs), clean)
        side = max(min(height, width) // 5, 1)
        rows, columns = height // side, width // side
        draws = keyed_random.uniform(keyed_random.derive(keys, 0), (rows, columns, channels + 1), dtype)
        tiles = pyramids(side, dtype, clean.device)[(draws[..., 0] < 0.5).long()]  # [b, rows, columns, side, side]
        tiles = tiles.unsqueeze(3) * _sign(draws[..., 1:])[..., None, None]  # [b, rows, columns, C, side, side]
        grid = tiles.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, rows * side, columns * side)
        delta = torch.zeros_like(clean)
        delta[:, :, : rows * side, : columns * side] = grid.to(clean.dtype)
        return self.threat.project(clean + self.threat.eps * _unit(delta), clean)

    def _change(self, current: Tensor, clean: Tensor, draws: Tensor, side: int) -> Tensor:
        """A change of each sample's image in a window of its own; ``draws`` of shape `[b, 5 + C]`."""
        height, width = clean.shape[-2:]
        top, left = _corner(draws[:, 0], height - side), _corner(draws[:, 1], width - side)
        signs = _sign(draws[:, 5:]).to(clean.dtype)
        first = _window(top, left, side, height, width)
        if self.threat.norm == "linf":
            # A step of 2 eps from anywhere in the ball ends at the surface.
            moved = clean + self.threat.eps * signs[:, :, None, None]
            return self.threat.project(torch.where(first, moved, current), clean)
        delta = current - clean
        second = _window(_corner(draws[:, 2], height - side), _corner(draws[:, 3], width - side), side, height, width)
        channels = clean.shape[1]
        freed = (delta * (first | second)).square().sum(dim=(2, 3), keepdim=True)
        unspent = (self.threat.eps**2 - delta.square().sum(dim=(1, 2, 3), keepdim=True)).clamp(min=0) / channels
        # The pyramid is laid at the window's place, and what is there adds to it with equal weight.
        pyramid = pyramids(side, clean.dtype, clean.device)[(draws[:, 4] < 0.5).long()]
        laid = _lay(pyramid, top, left, height, width).unsqueeze(1) * signs[:, :, None, None]
        inside = delta * first
        new = laid + inside / inside.square().sum(dim=(2, 3), keepdim=True).sqrt().clamp(min=1e-12)
        new = new / new.square().sum(dim=(2, 3), keepdim=True).sqrt().clamp(min=1e-12) * (unspent + freed).sqrt()
        delta = torch.where(first, new, torch.where(second, 0, delta))
        return self.threat.project(clean + self.threat.eps * _unit(delta), clean)


def _draw_dtype(images: Tensor) -> torch.dtype:
    return torch.float64 if images.dtype == torch.float64 else torch.float32


@lru_cache(maxsize=64)
def pyramids(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The L2 update of Algorithm 3 and its transpose, of shape `[2, side, side]` and unit norm.

    One half rises, the other falls: each is a pseudo-Gaussian of concentric rectangles that sums 1 / (k + 1)^2 over the
    rectangles k that hold the pixel.
    """

    def hill(height: int) -> Tensor:
        rows = (torch.arange(height) - height // 2).abs()
        columns = (torch.arange(side) - side // 2).abs()
        distance = torch.maximum(rows[:, None], columns[None, :])
        outermost = max(height // 2, side // 2) + 1
        weights = 1 / torch.arange(1, outermost + 1, dtype=torch.float64).square()
        sums = weights.flip(0).cumsum(0).flip(0)
        sums = torch.cat([sums, sums.new_zeros(1)])
        found = sums[distance.clamp(max=outermost)]
        return found / found.square().sum().sqrt().clamp(min=1e-12) if height else found

    both = torch.cat([hill(side // 2), -hill(side - side // 2)])
    both = both / both.square().sum().sqrt()
    return torch.stack([both, both.T]).to(device, dtype)


def _sign(draws: Tensor) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0).to(draws.dtype)


def _corner(draw: Tensor, room: int) -> Tensor:
    return (draw * (room + 1)).long()


def _window(top: Tensor, left: Tensor, side: int, height: int, width: int) -> Tensor:
    """Where each sample's window lies, bool of shape `[b, 1, H, W]`."""
    rows, columns = torch.arange(height, device=top.device), torch.arange(width, device=top.device)
    in_rows = (rows >= top[:, None]) & (rows < top[:, None] + side)
    in_columns = (columns >= left[:, None]) & (columns < left[:, None] + side)
    return (in_rows[:, :, None] & in_columns[:, None, :]).unsqueeze(1)


def _lay(tiles: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Tiles of shape `[b, s, s]` at their places in zeros of shape `[b, H, W]`."""
    side = tiles.shape[-1]
    steps = torch.arange(side, device=tiles.device)
    laid = tiles.new_zeros(len(tiles), height, width)
    rows = (top[:, None] + steps)[:, :, None]
    columns = (left[:, None] + steps)[:, None, :]
    laid[torch.arange(len(tiles), device=tiles.device)[:, None, None], rows, columns] = tiles
    return laid


def _unit(delta: Tensor) -> Tensor:
    return delta / delta.square().sum(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)

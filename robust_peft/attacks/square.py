"""Square Attack: random search with windows, a black-box attack that asks the model for its logits and nothing else.

Andriushchenko et al. 2020 (arXiv:1912.00049), Algorithms 1 to 3, with the settings of the standard AutoAttack (Croce
and Hein 2020, arXiv:2003.01690). Differs from AutoAttack's implementation in four ways:

- Each sample draws its own windows and signs from its key. There one window serves the whole batch, so that a sample's
  result hangs on who shares the batch.
- Windows may touch the last row and column, as in the paper. There the draw stops one short of them.
- L-inf: a window that would change nothing (a sign drawn once more where it already is) is drawn with the opposite
  signs, rather than spend a query on the image that was asked last. The paper's authors draw again until it changes.
- L2: the tiles of the start are centred in images of any height and width; there they are laid out for squares.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from robust_peft import keyed_random
from robust_peft.attacks.victim import Confirm, as_victim, full_precision_logits
from robust_peft.objectives import get_objective
from robust_peft.threat import ThreatModel

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After these queries of 10,000 a window's share of the pixels is halved (the paper's section 5)."""
_BLOCK = 64
"""Queries whose random numbers are drawn in one call: a call for each would cost as much as the rest of the query."""


@dataclass(frozen=True)
class Square:
    """``queries`` times: put a random window into the best image so far, and keep it if the margin grew.

    A sample that is misclassified already is attacked like any other: the image itself is not asked about.

    Args:
        threat: Norm, budget and box.
        queries: Windows tried in each restart, at least 1. The start, of stripes (L-inf) or tiles (L2), is one query
            more.
        p_init: Share of the pixels that the first windows cover, in (0, 1]. Later ones are smaller.
        restarts: Independent starts. The adversarial image kept is one that fools the model, if any does, or else the
            one with the highest margin.
        rescale_schedule: Shrink the windows over ``queries`` as over the paper's 10,000. False, as in the standard
            AutoAttack: by the number of the query, so that 5,000 of them end with larger windows.
        early_stop: Take a sample out of the batch once it is misclassified. False: nobody leaves the batch, for models
            that couple its samples; a misclassified one goes on with its image unchanged.

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
        p = self.p_init
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 < p <= 1:
            raise ValueError(f"p_init should be a number above 0 and at most 1. Found p_init = {p!r}.")
        for name in ("rescale_schedule", "early_stop"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} should be True or False. Found {name} = {value!r}.")

    def __str__(self) -> str:
        return f"Square-{self.queries}{f' x{self.restarts}' if self.restarts > 1 else ''} {self.threat}"

    def window(self, query: int, shape: torch.Size) -> int:
        """The side in pixels of the window of a query, counted from 0, in images of shape `[B, C, H, W]`."""
        if self.rescale_schedule:
            query = int(query / self.queries * 10000)
        height, width = shape[-2:]
        size = round(math.sqrt(self.p_init / 2 ** bisect_left(_HALVINGS, query) * height * width))
        if self.threat.norm == "l2":
            # Odd and at least 3, so that the pattern has a centre in each of its halves.
            size = max(size, 3) | 1
        return min(max(size, 1), height, width)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """Adversarial images. The model is attacked in eval mode, without gradients, and left as it was.

        Args:
            model: Pixels of shape `[B, C, H, W]` in the threat's box to logits of shape `[B, K]`.
            images: Images of shape `[B, C, H, W]` in the box.
            labels: Labels of shape `[B]`, int64.
            keys: The samples' random keys of shape `[B]` (`robust_peft.keyed_random`). None: drawn from torch's
                generator.

        Returns:
            Images of the shape and dtype of ``images``, inside ball and box.

        Raises:
            ValueError: If the images are not in the box or have another number of dimensions.
        """
        self.threat.check_images(images)
        return self.perturb(model, images, labels, keys=keys)

    @torch.no_grad()
    def perturb(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        keys: Tensor | None = None,
        confirm: Confirm | None = None,
    ) -> Tensor:
        """As calling the attack, without the check of the pixel range.

        Where ``confirm`` is given, a misclassified sample is done only if it agrees, and is attacked on if not.
        """
        if images.dim() != 4:
            raise ValueError(f"images should have the shape [B, C, H, W]. Found {list(images.shape)}.")
        images = images.detach()
        # A clean image may be outside the box by a rounding error; what is asked and returned never is.
        adv_images = self.threat.project(images, images)
        if len(images) == 0:
            return adv_images
        if keys is None:
            keys = keyed_random.fresh_keys(len(images), images.device)
        everyone = torch.arange(len(images), device=images.device)
        fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        adv_margins = torch.full((len(images),), -torch.inf, dtype=_arithmetic(images), device=images.device)
        with as_victim(model):
            for restart in range(self.restarts):
                # `rows` are the places in the batch of those in play; they, and what belongs to them, lose samples.
                rows = everyone[~fooled] if self.early_stop else everyone
                clean, own_keys = images[rows], keyed_random.derive(keys[rows], restart)
                best, margins = adv_images[rows], torch.full_like(adv_margins[rows], -torch.inf)
                numbers = own_keys
                for query in range(-1, self.queries):
                    if query < 0:
                        candidates = self._start(clean, keyed_random.derive(own_keys, 0))
                    else:
                        if query % _BLOCK == 0:
                            block_keys = keyed_random.derive(own_keys, 1 + query // _BLOCK)
                            numbers = keyed_random.uniform(block_keys, (_BLOCK, 5 + images.shape[1]))
                        size = self.window(query, images.shape)
                        candidates = self._candidates(clean, best, size, numbers[:, query % _BLOCK])
                    if not self.early_stop:
                        candidates = torch.where(_per_image(fooled), adv_images, candidates)
                    won, found = _ask(model, candidates, labels[rows], ~fooled[rows], rows, confirm)
                    accepted = found > margins
                    best = torch.where(_per_image(accepted), candidates, best)
                    margins = torch.where(accepted, found.to(margins.dtype), margins)
                    if not won.any():
                        continue
                    adv_images[rows[won]], fooled[rows[won]] = candidates[won], True
                    if fooled.all():
                        return adv_images
                    if self.early_stop:
                        state = (rows, clean, own_keys, best, margins, numbers)
                        rows, clean, own_keys, best, margins, numbers = (values[~won] for values in state)
                better = ~fooled[rows] & (margins > adv_margins[rows])
                adv_images[rows[better]], adv_margins[rows[better]] = best[better], margins[better]
        return adv_images

    def _start(self, images: Tensor, keys: Tensor) -> Tensor:
        """The images of the first query: vertical stripes (L-inf) or tiles of the L2 pattern, with random signs."""
        count, channels, height, width = images.shape
        if self.threat.norm == "linf":
            signs = _sign(keyed_random.uniform(keys, (channels, 1, width)))
            return self.threat.project(images + self.threat.eps * signs.to(images.dtype), images)
        # Five tiles fit into the shorter side, of at least one pixel each.
        size = max(min(height, width) // 5, 1)
        down, across = height // size, width // size
        numbers = keyed_random.uniform(keys, (1 + channels, down, across))
        pattern = _pattern(size, _arithmetic(images), images.device)
        turned = (numbers[:, :1, :, :, None, None] < 0.5).expand(-1, channels, -1, -1, size, size)
        tiles = torch.where(turned, pattern.T, pattern) * _sign(numbers[:, 1:, :, :, None, None]).to(pattern.dtype)
        tiled = tiles.transpose(3, 4).reshape(count, channels, down * size, across * size)
        above, left = (height - down * size) // 2, (width - across * size) // 2
        below, right = height - down * size - above, width - across * size - left
        return self._stretched(images, functional.pad(tiled, (left, right, above, below)))

    def _candidates(self, images: Tensor, best: Tensor, size: int, numbers: Tensor) -> Tensor:
        """The best images so far with a random window of ``size`` in each, from uniform ``numbers`` `[B, 5 + C]`."""
        window = _window(images, size, numbers[:, 0:2])
        signs = _sign(numbers[:, 5:, None])
        if self.threat.norm == "linf":
            # Algorithm 2. Twice eps either way ends on the surface of the ball wherever one started in it.
            clean, old = images.flatten(2).gather(2, window), best.flatten(2).gather(2, window)
            lowest = self.threat.project(clean - self.threat.eps, clean)
            highest = self.threat.project(clean + self.threat.eps, clean)
            changes = (torch.where(signs > 0, highest, lowest) != old).flatten(1).any(dim=1)
            up = (signs > 0) == changes.reshape(-1, 1, 1)
            return best.flatten(2).scatter(2, window, torch.where(up, highest, lowest)).view_as(images)
        # Algorithm 3: a second window gives up its share of the budget, and the first gets it in a new pattern.
        donor = _window(images, size, numbers[:, 2:4])
        delta = (best - images).flatten(2).to(_arithmetic(images))
        old, emptied = delta.gather(2, window), delta.scatter(2, donor, 0)
        # The energy of the union of both: all of the donor's, and of the window what is not in the donor.
        union = _energy(delta.gather(2, donor)) + _energy(emptied.gather(2, window))
        unspent = (self.threat.eps**2 - _energy(delta).sum(dim=1, keepdim=True)).clamp(min=0)
        pattern = _pattern(size, delta.dtype, delta.device)
        turned = numbers[:, 4, None, None] < 0.5
        new = torch.where(turned, pattern.T.flatten(), pattern.flatten()) * signs.to(delta.dtype) + _unit(old, 2)
        new = _unit(new, 2) * (unspent / images.shape[1] + union).sqrt()
        return self._stretched(images, emptied.scatter(2, window, new).view_as(images))

    def _stretched(self, images: Tensor, delta: Tensor) -> Tensor:
        """Images plus ``delta`` at the length of eps, in ball and box."""
        delta = self.threat.eps * _unit(delta.flatten(1), 1).view_as(images)
        return self.threat.project((images + delta).to(images.dtype), images)


def _ask(
    model: nn.Module, candidates: Tensor, labels: Tensor, standing: Tensor, rows: Tensor, confirm: Confirm | None
) -> tuple[Tensor, Tensor]:
    """One query: which of the standing samples are fooled by their candidates, and the margins, each of shape `[B]`.

    A margin that is no number is -inf: nothing could be told from it, and every later one should be an improvement.
    """
    logits = full_precision_logits(model, candidates)
    usable = logits.isfinite().all(dim=1)
    won = ((logits.argmax(dim=1) != labels) | ~usable) & standing
    if confirm is not None:
        asked = won.nonzero().squeeze(1)
        if len(asked):
            won[asked] = confirm(candidates[asked], rows[asked])
    return won, torch.where(usable, get_objective("margin")(logits, labels), -torch.inf)


def _window(images: Tensor, size: int, numbers: Tensor) -> Tensor:
    """Places of windows in flattened channels, `[B, C, size * size]`; ``numbers`` `[B, 2]` are uniform."""
    count, channels, height, width = images.shape
    # Below 1, so that the product stays below the number of positions also after rounding.
    top, left = (numbers * numbers.new_tensor([height - size + 1, width - size + 1])).long().unbind(1)
    side = torch.arange(size, device=images.device)
    inside = (side[:, None] * width + side).flatten()
    return ((top * width + left)[:, None] + inside)[:, None].expand(-1, channels, -1)


@lru_cache(maxsize=64)
def _pattern(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The L2 pattern of unit length, `[size, size]`: a hill in the upper half, a valley in the lower one (eq. 2)."""

    def hill(height: int) -> Tensor:
        peak = max(height, size) // 2
        rows = (torch.arange(height) - height // 2).abs()
        columns = (torch.arange(size) - size // 2).abs()
        distance = torch.maximum(rows[:, None], columns)
        # From each ring at least this far out to the rim, 1 / (k + 1)^2 each.
        heights = (torch.arange(1, peak + 2, dtype=torch.float64) ** -2).flip(0).cumsum(0).flip(0)
        return heights[distance] / heights[distance].norm().clamp(min=1e-12)

    pattern = torch.cat([hill(size // 2), -hill(size - size // 2)])
    return (pattern / pattern.norm()).to(device, dtype)


def _arithmetic(images: Tensor) -> torch.dtype:
    return torch.float64 if images.dtype == torch.float64 else torch.float32


def _per_image(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def _sign(numbers: Tensor) -> Tensor:
    return torch.where(numbers < 0.5, -1.0, 1.0)


def _energy(windows: Tensor) -> Tensor:
    return windows.square().sum(dim=2, keepdim=True)


def _unit(vectors: Tensor, dim: int) -> Tensor:
    return vectors / vectors.norm(dim=dim, keepdim=True).clamp(min=1e-12)

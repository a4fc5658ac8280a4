"""The progress bar of a training: losses, cosine, mu and images per second as they come."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


class Progress:
    """A bar over optimizer steps.

    Args:
        total: Steps of the whole run.
        done: Steps taken before this piece of it.
        shown: Whether to print at all (on the main process).
    """

    def __init__(self, total: int, done: int, shown: bool) -> None:
        # Five seconds between redraws where the output is a file would still fill it; tqdm thins out by itself.
        self.bar = tqdm(total=total, initial=done, disable=not shown, unit="step", dynamic_ncols=True, mininterval=0.5)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, record: dict[str, Any]) -> None:
        """Show the record of one optimizer step."""
        # A loss of exactly zero was not computed: its weight is zero.
        shown = {name: f"{record[f'{name}_loss']:.3f}" for name in ("clean", "adv") if record[f"{name}_loss"]}
        if "cos" in record:
            shown |= {"cos": f"{record['cos']:+.2f}", "mu": f"{record['mu']:.1e}"}
        shown["img/s"] = f"{record['images_per_second']:.0f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def validation(self, record: dict[str, Any]) -> None:
        """Print the record of a validation above the bar."""
        if not self.bar.disable:
            self.bar.write(
                f"epoch {record['epoch']}: validation standard {record['standard_accuracy']:.1%}, adversarial "
                f"({record['attack']}) {record['adversarial_accuracy']:.1%}, n={record['total']}"
            )

"""Studies that take a moment: pictures of 16 pixels and a network for them, both in files, for other processes."""

import pytest
import torch
from PIL import Image

from robust_peft.studies import Measurement, Method, Study, grid
from robust_peft.studies.work import perform

NETWORK = """
import os
import signal

import torch
from timm.models.vision_transformer import VisionTransformer


def network(num_classes=2):
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=num_classes
    )


def broken(num_classes=2):
    raise RuntimeError("out of luck")


def deadly(num_classes=2):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with ``photos``, class folders of red and of blue pictures, and ``net.py``; the working directory."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("test", 8)):
        for channel, name in ((0, "red"), (2, "blue")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 160, (16, 16, 3), generator=generator, dtype=torch.uint8)
                pixels[..., channel] += 60
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    (tmp_path / "net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SETTINGS = {
    "backbone.name": "net.py:network",
    "adapter.name": "full",
    "adapter.head_init": "keep",
    "data.name": "folder",
    "data.root": "photos",
    "data.image_size": 16,
    "data.batch_size": 8,
    "data.validation_share": 0.4,
    "data.workers": 0,
    "attack.steps": 1,
    "optim.lr": 3e-3,
    "optim.epochs": 2,
    "evaluation.batch_size": 4,
}
VANILLA = grid("vanilla", "surgery.lam", (0.1, 0.9), {"surgery.name": "vanilla"})
MEASURE = Measurement(("clean", "fgsm", "pgd-2"), split="validation", limit=10)
CONFIRM = Measurement(("clean", "pgd-4"), limit=12)


@pytest.fixture
def make_study(here):
    """A function that makes the study; what it is given replaces what stands here."""

    def make(**given):
        return Study(
            **{
                "name": "colours",
                "settings": SETTINGS,
                "methods": (*VANILLA, Method("CA-AT", settings={"surgery.name": "ca-at"})),
                "measure": MEASURE,
                "confirm": CONFIRM,
                **given,
            }
        )

    return make


class SameProcess:
    """Does each task at once, in this process."""

    def __init__(self, most=None):
        self.most, self.tasks, self.waiting = most, [], []

    @property
    def free(self):
        return not self.waiting

    def submit(self, task):
        if self.most is not None and len(self.tasks) == self.most:
            raise KeyboardInterrupt
        self.tasks.append(task)
        self.waiting.append((task, perform(task)))

    def ended(self, timeout):
        found, self.waiting = self.waiting, []
        return found

    def close(self):
        pass


@pytest.fixture
def same_process():
    return SameProcess

"""The zoo: which backbones there are by name, where their weights are published, and what was measured on them.

Facts are those of the pages named in each entry; what no page says is None and shown as unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

from robust_peft.models.factory import SHAPE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ZooEntry:
    """What a name, or a kind of names, stands for."""

    name: str
    architecture: str
    weights: str
    preprocessing: str

    def describe(self) -> str:
        """Several lines for people, as ``robust-peft zoo`` prints them."""
        return "\n".join(
            [
                self.name,
                f"  {self.architecture}",
                f"  weights: {self.weights}",
                f"  preprocessing: {self.preprocessing}",
            ]
        )


@dataclass(frozen=True, kw_only=True)
class PublishedBackbone:
    """A robust ImageNet classifier that somebody published, of a plain timm architecture."""

    name: str
    architecture: str
    """Name of the architecture in timm, 1000 classes."""
    file: str
    """Name of the published file."""
    page: str
    """Where a person finds the file."""
    url: str | None
    """Where the file itself is served; None: on the page alone, by hand."""
    paper: str
    clean_accuracy: float
    """In percent, on ImageNet's validation images or the part of them that `measured_on` names."""
    robust_accuracy: tuple[tuple[str, float], ...]
    """Attack and accuracy in percent, L-inf, `eps`."""
    measured_on: str
    eps: str = "4/255"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    image_size: int = 224
    """Pixels on each side."""
    crop_pct: float = 0.875
    """Side of the centre crop as a share of the shorter side that the image is resized to."""
    interpolation: str = "bicubic"
    licence: str | None = None
    sha256: str | None = None

    @property
    def weights(self) -> str:
        """Where they are."""
        return f"{self.file}, {'downloaded from' if self.url else 'to be fetched by hand from'} {self.url or self.page}"

    @property
    def preprocessing(self) -> str:
        """What the backbone wants to see."""
        resized = round(self.image_size / self.crop_pct)
        size = f"resize {resized}, centre crop {self.image_size}" if self.crop_pct < 1 else f"resize {self.image_size}"
        return f"{size}, {self.interpolation}; mean {self.mean} and std {self.std} inside the model"

    @property
    def size_step(self) -> int:
        """image_size has to be a multiple of it: pixels of a patch, for Swin of a token in the last stage."""
        return 32 if self.architecture.startswith("swin") else 16

    def describe(self) -> str:
        """Several lines for people, as ``robust-peft zoo`` prints them."""
        robust = ", ".join(f"{accuracy} % under {attack}" for attack, accuracy in self.robust_accuracy)
        return "\n".join(
            [
                self.name,
                f"  {self.architecture} (timm)",
                f"  weights: {self.weights}",
                f"  source: {self.page}; {self.paper}",
                f"  published: {self.clean_accuracy} % clean, {robust}, L-inf {self.eps} ({self.measured_on})",
                f"  preprocessing: {self.preprocessing}",
                f"  licence: {self.licence or 'unknown'}; SHA-256: {self.sha256 or 'unknown'}",
            ]
        )


def _ares(size: str, architecture: str, file: str, clean: float, pgd: float, autoattack: float) -> PublishedBackbone:
    return PublishedBackbone(
        name=f"ares/{size}",
        architecture=architecture,
        file=file,
        page="https://github.com/thu-ml/ares/tree/main/robust_training",
        url=f"https://ml.cs.tsinghua.edu.cn/~xiaoyang/aresbench/ckpt-imagenet/{file}",
        paper="Liu et al. 2023, arXiv:2302.14301",
        clean_accuracy=clean,
        robust_accuracy=(("PGD-100", pgd), ("AutoAttack", autoattack)),
        measured_on="1000 images",
        licence="MIT (the repository's; none is stated for the files)",
    )


def _robustbench(
    name: str, architecture: str, key: str, drive: str, paper: str, clean: float, autoattack: float, crop_pct: float
) -> PublishedBackbone:
    return PublishedBackbone(
        name=f"robustbench/{name}",
        architecture=architecture,
        file=f"{key}.pt",
        # Google Drive asks for a confirmation in a browser, so that nothing is fetched from there.
        page=f"https://drive.google.com/file/d/{drive}/view",
        url=None,
        paper=paper,
        clean_accuracy=clean,
        robust_accuracy=(("AutoAttack", autoattack),),
        measured_on="RobustBench, 5000 images",
        crop_pct=crop_pct,
        interpolation="bicubic" if crop_pct < 1 else "bilinear",  # its BicubicRes256Crop224 and Res224
    )


PUBLISHED: tuple[PublishedBackbone, ...] = (
    _ares(
        "swin_small",
        "swin_small_patch4_window7_224",
        "ARES_Swin_small_patch4_window7_224_AT.pth",
        76.6,
        58.4,
        55.6,
    ),
    _ares(
        "swin_base",
        "swin_base_patch4_window7_224",
        "ARES_Swin_base_patch4_window7_224_AT.pth",
        76.6,
        60.2,
        57.3,
    ),
    _ares(
        "swin_large",
        "swin_large_patch4_window7_224",
        "ARES_Swin_large_patch4_window7_224_AT.pth",
        79.7,
        63.9,
        62.3,
    ),
    _ares("vit_small", "vit_small_patch16_224", "ARES_ViT_small_patch16_224_AT.pth", 70.7, 47.5, 43.7),
    _ares("vit_base", "vit_base_patch16_224", "ARES_ViT_base_patch16_224_AT.pth", 74.7, 52.2, 49.7),
    _robustbench(
        "mo2022-swin-base",
        "swin_base_patch4_window7_224",
        "Mo2022When_Swin-B",
        "1-SXi4Z2X6Zo_j8EO4slJcBMXNej8fKUd",
        "Mo et al. 2022, arXiv:2210.07540",
        74.66,
        38.30,
        1.0,
    ),
    _robustbench(
        "mo2022-vit-base",
        "vit_base_patch16_224",
        "Mo2022When_ViT-B",
        "1-dUFdvDBflqMsMLjZv3wlPJTm-Jm7net",
        "Mo et al. 2022, arXiv:2210.07540",
        68.38,
        34.40,
        1.0,
    ),
    _robustbench(
        "rodriguezmunoz2024-swin-base",
        "swin_base_patch4_window7_224",
        "RodriguezMunoz2024Characterizing_Swin-B",
        "1-BSUjoFXx3PP-TfeE5fjbofO2lLyUf56",
        "Rodriguez-Munoz et al. 2024, arXiv:2409.20139",
        77.76,
        51.56,
        0.875,
    ),
    _robustbench(
        "rodriguezmunoz2024-swin-large",
        "swin_large_patch4_window7_224",
        "RodriguezMunoz2024Characterizing_Swin-L",
        "1-Dc9WhPU2wv4OMskLo1U57n5O8VbpNXv",
        "Rodriguez-Munoz et al. 2024, arXiv:2409.20139",
        79.36,
        53.82,
        0.875,
    ),
)

ENTRIES: tuple[ZooEntry | PublishedBackbone, ...] = (
    ZooEntry(
        "micro_swin",
        "Swin, 3.1 M parameters, 32 px, convolutional stem, depths 2 and 6",
        "in this package; trained adversarially on CIFAR-10, L-inf 8/255",
        "CIFAR-10 mean and std inside the model",
    ),
    *PUBLISHED,
    *(
        ZooEntry(name, f"{architecture}, for 32 px", "none; to be trained (--backbone.checkpoint random)", "none")
        for name, architecture in (
            ("resnet18", "ResNet-18, 11.2 M parameters"),
            ("resnet34", "ResNet-34, 21.3 M parameters"),
            ("wrn28_10", "WRN-28-10, 36.5 M parameters"),
        )
    ),
    ZooEntry("timm/NAME", "any timm classifier", "timm's own, from the Hub", "timm's mean and std inside the model"),
    ZooEntry("hf/NAME", "any transformers image classifier", "from the Hub", "its image processor's mean and std"),
    ZooEntry(
        SHAPE,
        "what a function in a Python file of your own returns; the file is executed",
        "the function's own, or --checkpoint",
        "the model takes pixels in [0, 1]; a bare timm model gets timm's mean and std",
    ),
)


def published(name: str) -> PublishedBackbone | None:
    """The published backbone of that name; None where there is none."""
    return next((entry for entry in PUBLISHED if entry.name == name), None)

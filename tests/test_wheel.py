"""What a user gets who installs the wheel: everything that is needed to use the package, and nothing else."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 12e6  # bytes
USE = """
import torch
import robust_peft as rp

model = rp.load_backbone("micro_swin").eval()
with torch.no_grad():
    logits = model(torch.zeros(2, 3, 32, 32))
assert logits.shape == (2, 10) and logits.isfinite().all(), logits
print(rp.__file__)
"""


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that must succeed, without this process's own paths."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel in it, which borrows the dependencies (not the package) of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # .pth files inside a folder that a .pth file names are ignored: an editable install does not come along.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(borrowed)))
    return folder


def test_wheel_holds_the_package_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"robust_peft"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "robust_peft").rglob("*.py")}
    assert sources <= set(names)
    assert {"robust_peft/py.typed", "robust_peft/models/weights/micro_swin.safetensors"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < LIMIT


def test_installed_package_works_anywhere(environment: Path, tmp_path: Path) -> None:
    """The embedded weights load with no source tree in sight."""
    location = run(environment / "bin" / "python", "-c", USE, cwd=tmp_path).strip()
    assert Path(location).is_relative_to(environment)


def test_installed_command_shows_help(environment: Path, tmp_path: Path) -> None:
    assert "train" in run(environment / "bin" / "robust-peft", "--help", cwd=tmp_path)

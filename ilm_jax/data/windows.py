"""A SeqIO feature converter that sees a window of consecutive examples at once."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import seqio
import tensorflow as tf

from ilm_jax.data import packing

FeatureSpec = seqio.FeatureConverter.FeatureSpec

# Marks the end of an example while a window is a rectangle. No token and no entity is this value.
_ABSENT = np.iinfo(np.int32).min
# Windows converted ahead. tf.data keeps their order, so the number changes speed only.
_PARALLEL_WINDOWS = 2
_INDEX = 'index'  # of an example in the data set, for messages
_SHOWN_TOKENS = 64  # of an example, in messages


def int32_features(*names: str) -> dict[str, FeatureSpec]:
  return {name: FeatureSpec(dtype=tf.int32) for name in names}


class WindowFeatureConverter(seqio.FeatureConverter):
  """Runs `convert_window`, which sees a whole window of examples at once, inside tf.data."""

  PACKING_FEATURE_DTYPES: ClassVar[Mapping[str, Any]] = {}
  _window: int = 256

  @abc.abstractmethod
  def check_window(self, examples: Mapping[str, packing.Ragged]) -> tuple[int, str] | None:
    """Returns (example of the window, what is wrong with it), or None if all is well."""

  @abc.abstractmethod
  def convert_window(
    self, examples: Mapping[str, packing.Ragged], model_feature_lengths: Mapping[str, int]
  ) -> dict[str, np.ndarray]:
    """Returns the model features, each int32 [rows, its length]."""

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    task_features = list(self.TASK_FEATURES)
    lengths = dict(self.get_model_feature_lengths(task_feature_lengths))
    model_features = list(lengths)

    def convert(first: np.ndarray, *rectangles: np.ndarray) -> tuple:
      examples = {}
      for name, rectangle in zip(task_features, rectangles):
        present = rectangle != _ABSENT
        examples[name] = rectangle[present], present.sum(axis=1)
      problem = self.check_window(examples)
      if problem is not None:
        # Raised by tf.debugging.Assert below: an exception of this function would reach the
        # user wrapped in the stack of tf.data, with the message somewhere in the middle.
        index, message = problem
        shown = '; '.join(_show(name, examples[name], index) for name in task_features)
        empty = [np.zeros((0, lengths[name]), np.int32) for name in model_features]
        return (f'example {first + index} of the data set: {message} The example: {shown}', *empty)
      features = self.convert_window(examples, lengths)
      return ('', *(features[name] for name in model_features))

    def convert_tf(window: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
      problem, *features = tf.numpy_function(
        convert,
        [window[_INDEX][0], *(window[name] for name in task_features)],
        [tf.string, *(tf.int32 for _ in model_features)],
        stateful=False,
      )
      with tf.control_dependencies([tf.debugging.Assert(tf.equal(problem, ''), [problem])]):
        return {
          name: tf.ensure_shape(feature, [None, lengths[name]])
          for name, feature in zip(model_features, features)
        }

    ds = ds.enumerate().map(
      lambda index, example: {_INDEX: index, **{name: example[name] for name in task_features}}
    )
    # Rectangles are ten times faster to make than a RaggedTensor.
    ds = ds.padded_batch(
      self._window,
      padded_shapes={_INDEX: tf.TensorShape([])}
      | dict.fromkeys(task_features, tf.TensorShape([None])),
      padding_values={_INDEX: np.int64(0)} | dict.fromkeys(task_features, np.int32(_ABSENT)),
    )
    ds = ds.map(convert_tf, num_parallel_calls=_PARALLEL_WINDOWS, deterministic=True)
    return ds.unbatch()


def count_per_example(feature: packing.Ragged, token: int) -> np.ndarray:
  values, lengths = feature
  example = np.repeat(np.arange(len(lengths)), lengths)
  return np.bincount(example[values == token], minlength=len(lengths))


def negative_entity(entity_ids: packing.Ragged) -> tuple[int, str] | None:
  values, lengths = entity_ids
  if (values >= 0).all():
    return None
  position = int(np.flatnonzero(values < 0)[0])
  example = int(np.searchsorted(np.cumsum(lengths), position, side='right'))
  return example, (
    f"'entity_ids' contains {values[position]}; entities are numbered from 0, and negative ids"
    ' are kept for padding.'
  )


def _show(name: str, feature: packing.Ragged, example: int) -> str:
  """Returns e.g. 'inputs = [7, 9, 9, 5] (4)', cut after the first tokens."""
  values, lengths = feature
  start = int(lengths[:example].sum())
  size = int(lengths[example])
  shown = values[start : start + min(size, _SHOWN_TOKENS)].tolist()
  dots = ' ...' if size > _SHOWN_TOKENS else ''
  return f'{name} = {shown}{dots} (length {size})'

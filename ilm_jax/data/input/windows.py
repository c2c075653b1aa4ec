"""A SeqIO feature converter that sees a window of consecutive examples at once."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import seqio
import tensorflow as tf

from ilm_jax.data.input.sources import ragged

FeatureSpec = seqio.FeatureConverter.FeatureSpec

INDEX = 'index'  # of an example, for messages
_SHOWN_TOKENS = 64  # of an example, in messages

Window = Mapping[str, tf.RaggedTensor]  # feature -> [n, None] int32


@dataclasses.dataclass(frozen=True)
class Check:
  """A condition that examples of a window must not meet.

  Attributes:
    wrong: [n] bool, true where the example is wrong.
    message: what to say of the first wrong one, with `{}` for each of `numbers`.
    numbers: [n] integers each, of which the wrong example's are shown.
  """

  wrong: tf.Tensor
  message: str
  numbers: Sequence[tf.Tensor]


def int32_features(*names: str) -> dict[str, FeatureSpec]:
  return {name: FeatureSpec(dtype=tf.int32) for name in names}


class WindowFeatureConverter(seqio.FeatureConverter):
  """Runs `convert_window`, which sees a whole window of examples at once, inside tf.data.

  Attributes:
    window: how many consecutive examples are converted, and packed, together.
  """

  PACKING_FEATURE_DTYPES: ClassVar[Mapping[str, Any]] = {}
  window: int = 256

  def __init__(self, **kwargs: Any):
    super().__init__(**kwargs)
    self._traced: dict[Any, Any] = {}

  @abc.abstractmethod
  def checks(self, examples: Window) -> list[Check]:
    """What must not be, most telling first."""

  @abc.abstractmethod
  def convert_window(
    self, examples: Window, model_feature_lengths: Mapping[str, int]
  ) -> dict[str, tf.Tensor]:
    """Returns (at least) the model features, each int32 [rows, its length]."""

  def _convert_features(
    self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
  ) -> tf.data.Dataset:
    names = list(self.TASK_FEATURES)
    ds = ds.enumerate().map(lambda i, example: {INDEX: i, **{n: example[n] for n in names}})
    ds = ds.ragged_batch(self.window)
    traced = self.traced(task_feature_lengths)
    ds = ds.map(traced, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).unbatch()
    # Features of length 0 (entity_ids of text-only tasks) are added now: unbatching them crashes.
    empty = {name: tf.zeros([0], tf.int32) for name in self.empty_features(task_feature_lengths)}
    return ds.map(lambda example: {**example, **empty}) if empty else ds

  def empty_features(self, task_feature_lengths: Mapping[str, int]) -> list[str]:
    """The model features of length 0, which `traced` leaves out."""
    lengths = self.get_model_feature_lengths(task_feature_lengths)
    return [name for name, size in lengths.items() if not size]

  def traced(
    self, task_feature_lengths: Mapping[str, int]
  ) -> Callable[[Mapping[str, Any]], dict[str, tf.Tensor]]:
    """The conversion of a window, traced once for all pipelines of this converter.

    Args:
      task_feature_lengths: as in SeqIO.

    Returns:
      A function from the task features of n examples, and `index` [n] int64 (what messages call
      them), to model features [rows, its length]. It fails while iterating where an example is
      wrong.
    """
    lengths = dict(self.get_model_feature_lengths(task_feature_lengths))

    def convert(window: Mapping[str, Any]) -> dict[str, tf.Tensor]:
      examples = {name: ragged(window[name]) for name in self.TASK_FEATURES}
      checks = [_too_long(n, x, task_feature_lengths[n]) for n, x in examples.items()]
      checks += self.checks(examples)
      with tf.control_dependencies([_assert_none_wrong(checks, examples, window[INDEX])]):
        # What is made of these copies waits for the checks.
        examples = {n: x.with_values(tf.identity(x.values)) for n, x in examples.items()}
      features = self.convert_window(examples, lengths)
      return {n: tf.ensure_shape(features[n], [None, size]) for n, size in lengths.items() if size}

    # Autograph has nothing to convert.
    key = tuple(sorted(task_feature_lengths.items()))
    return self._traced.setdefault(key, tf.function(convert, autograph=False))


def count_per_example(feature: tf.RaggedTensor, token: int) -> tf.Tensor:
  """How often each example of a [n, None] feature contains `token`: [n] int64."""
  return tf.reduce_sum(tf.cast(feature == token, tf.int64), axis=1)


def negative_entity(entity_ids: tf.RaggedTensor) -> Check:
  # The 0 makes the smallest entity of an example without any defined.
  zero = tf.zeros([entity_ids.nrows(), 1], tf.int32)
  smallest = tf.reduce_min(tf.concat([entity_ids, zero], axis=1), axis=1)
  return Check(
    smallest < 0,
    'its entity_ids contain {}; entities are numbered from 0, and negative ids are kept for'
    ' padding.',
    [smallest],
  )


def _too_long(name: str, feature: tf.RaggedTensor, limit: int) -> Check:
  sizes = feature.row_lengths()
  return Check(
    sizes > limit,
    f'its {name} have length {{}}, but task_feature_lengths allows {limit}. Raise that length, or'
    ' have the prompt drop its oldest history.',
    [sizes],
  )


def _assert_none_wrong(
  checks: Sequence[Check], examples: Window, indices: tf.Tensor
) -> tf.Operation:
  failed = tf.stack([tf.reduce_any(check.wrong) for check in checks])

  def describe() -> tf.Tensor:
    # One description, whichever check it is of: one for each would take seconds to trace.
    check = tf.argmax(tf.cast(failed, tf.int32))
    i = tf.argmax(tf.gather(tf.stack([tf.cast(c.wrong, tf.int32) for c in checks]), check))
    most = max(len(c.numbers) for c in checks)
    # Every check as if it had as many numbers; those that it has not are no text.
    texts = [[*c.message.split('{}'), *[''] * most][: most + 1] for c in checks]
    none = tf.fill(tf.shape(indices), '')
    numbers = [[*map(tf.as_string, c.numbers), *[none] * most][:most] for c in checks]
    text = tf.gather(tf.constant(texts), check)
    number = tf.concat([tf.gather(tf.stack(numbers), check)[:, i], ['']], axis=0)
    message = tf.strings.reduce_join(tf.stack([text, number], axis=1))
    shown = '; '.join(f'{name} = {{}} (length {{}})' for name in examples)
    values = [x for feature in examples.values() for x in (feature[i], tf.size(feature[i]))]
    example = tf.strings.format(shown, values, summarize=_SHOWN_TOKENS // 2)
    index = tf.as_string(indices[i])
    return tf.strings.join(
      ['example ', index, ' of the data set: ', message, ' The example: ', example]
    )

  # The message is only put together where there is something to say.
  any_failed = tf.reduce_any(failed)
  message = tf.cond(any_failed, describe, lambda: tf.constant(''))
  return tf.debugging.Assert(tf.logical_not(any_failed), [message])

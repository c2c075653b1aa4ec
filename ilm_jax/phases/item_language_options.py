"""The options of phase 2, and what is made of them."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ilm_jax.config.types import make_dataclass
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.lm.load import default_compute
from ilm_jax.modules.layers import Compute
from ilm_jax.modules.soft_tokens import MlpConfig, SoftTokenConfig
from ilm_jax.phases.qformer_options import qformer_config
from ilm_jax.tasks.names import TEMPLATES


@dataclasses.dataclass(frozen=True)
class ItemLanguageData:
  """What phase 2 reads, and how prompts are written.

  Attributes:
    templates: a file of prompt templates; a bare name is one of those that come with ilm_jax.
    form: how items are written: 'title' or 'id'.
    dataset: the domain's name in prompts; by default the data set's, in capitals.
    prefix: text at the beginning of every prompt. It is run once, and not in every step.
    neutral_prompt: text after the prefix that says nothing of a user: what a title is worth by
      itself is measured there, for the catalogue loss and for calibrated scores.
    history_length: items of a history in a prompt, at most.
    sequence_length: items of a history of the source 'item_sequence'.
    max_text_tokens: longer texts of items and users are cut.
    max_inputs, max_targets, max_entities: of a row of the batch.
    pack: whether a row holds several examples.
    users: what a user is encoded from: its CF 'vector' (the paper), or its last 'items'.
    eval_batch_size: rows of an evaluation's batches; the largest of the training's by default.
    eval_examples: of each task, at most, whose loss is measured.
  """

  templates: str = 'templates.txt'
  form: Literal['title', 'id'] = 'title'
  dataset: str | None = None
  prefix: str = ''
  neutral_prompt: str = ''
  history_length: int = 20
  sequence_length: int = 50
  max_text_tokens: int = 32
  max_inputs: int = 448
  max_targets: int = 64
  max_entities: int = 64
  pack: bool = True
  users: Literal['vector', 'items'] = 'vector'
  eval_batch_size: int | None = None
  eval_examples: int = 512


@dataclasses.dataclass(frozen=True)
class LmOptions:
  """The language model of phase 2.

  Attributes:
    name: of `ilm_jax.lm.load`, or a path.
    tokenizer: a file, where the checkpoint has none.
    trained: whether it is trained too (the paper's text_only and full fine-tuning).
    remat: 'none', 'dots' or 'full': see `ilm_jax.modules.layers.Compute`.
    attention: 'xla', 'splash' (TPU) or 'cudnn' (GPU); by default, and where that kernel does not
      exist, 'cudnn' on GPUs and 'xla' elsewhere.
    int8: whether its weights are kept in 8 bits.
  """

  name: str
  tokenizer: str | None = None
  trained: bool = False
  remat: str = 'none'
  attention: str | None = None
  int8: bool = False


_log = logging.getLogger(__name__)
_PLATFORMS = {'splash': 'tpu', 'cudnn': 'gpu'}


def lm_compute(options: LmOptions, platform: str | None = None) -> Compute:
  """How the language model is run on a platform; by default where JAX runs.

  A run may be made on TPUs and asked on a laptop: there, a kernel of TPUs is left out, and told.
  """
  platform = platform or jax.default_backend()
  compute = default_compute(platform)
  attention = options.attention or compute.attention
  if (needed := _PLATFORMS.get(attention, platform)) != platform:
    _log.warning(
      'train.lm.attention=%r is a kernel for %ss, and this is a %s: %r is used.',
      attention, needed.upper(), platform.upper(), compute.attention,
    )  # fmt: skip
    attention = compute.attention
  compute = dataclasses.replace(compute, remat=options.remat, attention=attention)
  if options.trained:
    return dataclasses.replace(compute, param_dtype=jnp.float32)
  return dataclasses.replace(compute, param_dtype='int8') if options.int8 else compute


def soft_token_config(
  given: Mapping[str, Any],
  text: ItemLanguageData,
  lm_options: LmOptions,
  *,
  d_model: int,
  gain: float,
  d_cf: int,
  platform: str | None = None,
) -> SoftTokenConfig | None:
  """Item encoder and adaptor of `train.item_encoder`; None for 'none'.

  Args:
    given: 'kind', 'normalise', 'skip', 'adaptor_text', 'size' and the fields of QFormerConfig or of
      MlpConfig.
    text, lm_options: of the run.
    d_model: width of the language model.
    gain: the RMS of its token embeddings.
    d_cf: width of the entity table.
    platform: of `qformer_config`.

  Raises:
    UsageError: an option is unknown, or does not fit.
  """
  options = dict(given)
  kind = options.pop('kind', 'qformer')
  kinds = ('qformer', 'mlp', 'none')
  if kind not in kinds:
    hint = did_you_mean(kind, kinds)
    raise UsageError(f'train.item_encoder.kind={kind!r}: one of {", ".join(kinds)}.{hint}')
  if kind == 'none':
    if options or not lm_options.trained:
      raise UsageError(
        "train.item_encoder.kind='none': nothing is encoded, so that there are no other options,"
        " and what is trained is the language model: train.lm={..., 'trained': True}."
      )
    return None
  normalise, skip = options.pop('normalise', True), options.pop('skip', False)
  standardise = bool(options.pop('adaptor_text', ()))
  if kind == 'mlp':
    if 'd_encoder' in options:
      raise UsageError('train.item_encoder.d_encoder is decided by the data: leave it out.')
    values = {**options, 'd_encoder': d_cf}
    encoder: Any = make_dataclass(MlpConfig, values, 'train.item_encoder')
  else:
    encoder = qformer_config(options, platform, d_encoder=d_cf, has_text=False)
  by_items = text.users == 'items'
  try:
    return SoftTokenConfig(
      encoder,
      d_model,
      normalise=normalise,
      gain=gain,
      skip=skip,
      standardise=standardise,
      max_encoder_tokens=text.history_length if by_items else 1,
    )
  except ValueError as error:
    raise UsageError(f'train.item_encoder: {error}') from error


def template_file(name: str) -> Path:
  """A path, or the name of a file beside the tasks of ilm_jax."""
  own = TEMPLATES.parent / name
  return own if not Path(name).exists() and own.exists() else Path(name)

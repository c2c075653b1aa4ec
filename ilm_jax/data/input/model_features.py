"""Model features of the feature converters, their lengths and padding: imports no TensorFlow."""

from collections.abc import Iterable, Mapping

LM_FEATURES = (
  'decoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights', 'entity_ids',
)  # fmt: skip
LM_PACKED = ('decoder_segment_ids', 'decoder_positions')  # besides, of packed rows
ENC_DEC_FEATURES = ('encoder_input_tokens', *LM_FEATURES)
ENC_DEC_PACKED = ('encoder_segment_ids', 'encoder_positions', *LM_PACKED)
ENTITY_TEXT_FEATURES = ('text_tokens', 'text_mask', 'entity_ids')

# What fills a row after its last example. 0 for tokens, as in SeqIO; but entity 0 is an entity.
PAD_VALUES = {'entity_ids': -1}


def lm_lengths(features: Iterable[str], task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
  """The decoder's length is that of inputs and targets together."""
  length = task_feature_lengths['inputs'] + task_feature_lengths['targets']
  return {**dict.fromkeys(features, length), 'entity_ids': task_feature_lengths['entity_ids']}


def enc_dec_lengths(
  features: Iterable[str], task_feature_lengths: Mapping[str, int]
) -> dict[str, int]:
  """The encoder's length is that of inputs, the decoder's that of targets."""
  task_feature = {'encoder': 'inputs', 'decoder': 'targets', 'entity': 'entity_ids'}
  return {name: task_feature_lengths[task_feature[name.split('_')[0]]] for name in features}


def entity_text_lengths(task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
  """Those of the task features."""
  length = task_feature_lengths['targets']
  entities = task_feature_lengths['entity_ids']
  return {'text_tokens': length, 'text_mask': length, 'entity_ids': entities}

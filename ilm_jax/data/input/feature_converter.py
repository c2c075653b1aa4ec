"""SeqIO feature converters for prompts with entities, and for the item text of phase 1.

An entity stands in a prompt as K copies of one reserved slot token (K = `num_soft_tokens`), and
`entity_ids` lists the entities in the order of their slots. On the device slot number i of a row
takes soft token i % K of entity entity_ids[i // K], so three things must hold for every row:

  * slots == K * len(entity_ids); otherwise every later entity of the row is spliced wrongly,
  * the entities of a packed row are concatenated in the order of its segments,
  * `entity_ids` is padded with -1, because 0 is an entity.

The converters here guarantee the last two and check the first, example by example, on the host.
They take the place of SeqIO's own (LMFeatureConverter, PrefixLMFeatureConverter,
EncDecFeatureConverter), whose names they use and whose validations they pass. Packing is ours:
SeqIO's has no notion of a feature that must be packed along with another one.

Examples are converted in windows of `window` consecutive examples by TensorFlow ops on the whole
window, and packed within it. The result depends on the examples and on `window`, not on timing.
"""

from collections.abc import Mapping
from typing import ClassVar

import tensorflow as tf

from ilm_jax.data.input import model_features, packing
from ilm_jax.data.input.packing import shift_right
from ilm_jax.data.input.windows import (
  Check,
  Window,
  WindowFeatureConverter,
  count_per_example,
  int32_features,
  negative_entity,
)
from ilm_jax.errors import UsageError

_PROMPT, _TARGET = 1, 2


class ItemLanguageFeatureConverter(WindowFeatureConverter):
  """What the converters for decoder-only and encoder-decoder LMs share.

  Use one of: ItemLMFeatureConverter (decoder-only, causal), ItemPrefixLMFeatureConverter
  (decoder-only, the prompt attends to itself in both directions), ItemEncDecFeatureConverter.

  Task features, each 1-D int32: `inputs` (the prompt), `targets` (what is to be predicted,
  ending with EOS), `entity_ids`. `task_feature_lengths` names all three; with packing they are
  what a packed row holds, so 'entity_ids' bounds the entities of a row.

  Args:
    slot_id: id of the slot token, `SlotVocabulary.slot_id`.
    num_soft_tokens: K, slots per entity. 0 means text only: no slot and no entity.
    bos_id: first input of the decoder, `SlotVocabulary.bos_id`: 2 for Gemma, 0 for T5.
    pack: whether to pack several examples into a row. SeqIO's Evaluator wants False.
    window: how many consecutive examples are packed together.
    apply_length_check: whether SeqIO checks every length, before and after (its validations 2
      and 4), which takes half of the time or more. The converter checks lengths in either case.
    use_custom_packing_ops: only False; T5X passes it.

  Raises:
    UsageError: an argument is not as described.
    tf.errors.InvalidArgumentError: while iterating, when an example is too long, has slots != K *
      entities, a slot in its targets, or a negative entity id. The message shows the example.
  """

  TASK_FEATURES = int32_features('inputs', 'targets', 'entity_ids')

  def __init__(
    self,
    *,
    slot_id: int,
    num_soft_tokens: int,
    bos_id: int,
    pack: bool = False,
    window: int = 256,
    apply_length_check: bool = True,
    use_custom_packing_ops: bool = False,
  ):
    if bos_id is None or bos_id < 0:
      raise UsageError(
        f'{type(self).__name__}: bos_id={bos_id}, the first input of the decoder, must be a token'
        ' id. T5 has no BOS and uses 0 (SlotVocabulary.bos_id says so); Gemma needs 2.'
      )
    for name, value, least in (
      ('slot_id', slot_id, 0),
      ('num_soft_tokens', num_soft_tokens, 0),
      ('window', window, 1),
    ):
      if value < least:
        raise UsageError(f'{type(self).__name__}: {name}={value}; expected {least} or more.')
    if use_custom_packing_ops:
      raise UsageError(
        f'{type(self).__name__}: use_custom_packing_ops=True; allowed: False. Its packing knows'
        ' nothing of entities and needs tensor2tensor; pack=True alone is fast.'
      )
    super().__init__(pack=pack, apply_length_check=apply_length_check, bos_id=bos_id)
    self._slot_id = slot_id
    self._num_soft_tokens = num_soft_tokens
    self.window = window

  def checks(self, examples: Window) -> list[Check]:
    """Slots == K * entities, and no slot in the targets."""
    slots = count_per_example(examples['inputs'], self._slot_id)
    target_slots = count_per_example(examples['targets'], self._slot_id)
    entities = examples['entity_ids'].row_lengths()
    k = self._num_soft_tokens
    # No quotation marks in these messages: TensorFlow would print a backslash before each.
    in_targets = Check(
      target_slots > 0,
      f'its targets contain the slot token {self._slot_id} ({{}} times); targets are text,'
      ' entities belong into the inputs.',
      [target_slots],
    )
    if k == 0:
      mismatch = Check(
        (slots > 0) | (entities > 0),
        f'its inputs contain {{}} slot tokens ({self._slot_id}) and its entity_ids {{}} entities,'
        ' but num_soft_tokens=0 says that there are none.',
        [slots, entities],
      )
    else:
      mismatch = Check(
        slots != k * entities,
        f'its inputs contain {{}} slot tokens ({self._slot_id}), but its entity_ids have {{}}'
        f' entities, which need {{}} * num_soft_tokens = {{}}. Either the prompt was built for'
        ' another num_soft_tokens, or SeqIO cut it to the inputs or entity_ids of'
        ' task_feature_lengths: raise that length, or have the prompt drop its oldest history.',
        [slots, entities, entities, k * entities],
      )
    return [in_targets, mismatch, negative_entity(examples['entity_ids'])]


class ItemLMFeatureConverter(ItemLanguageFeatureConverter):
  """Prompts with entities for a decoder-only LM with causal attention.

  Prompt and targets are concatenated; the loss is taken on the targets only, never on the
  prompt, its slots or padding. Slot token 9, K = 2, BOS 2, EOS 1, not packed:

    ds = [{'inputs': [7, 9, 9, 5], 'targets': [3, 1], 'entity_ids': [40]},
          {'inputs': [8, 9, 9, 9, 9], 'targets': [4, 1], 'entity_ids': [0, 41]}]

    task_feature_lengths = {'inputs': 6, 'targets': 3, 'entity_ids': 3}

    converted_ds = [{
        'decoder_target_tokens': [7, 9, 9, 5, 3, 1, 0, 0, 0],
         'decoder_input_tokens': [2, 7, 9, 9, 5, 3, 0, 0, 0],
         'decoder_loss_weights': [0, 0, 0, 0, 1, 1, 0, 0, 0],
                   'entity_ids': [40, -1, -1]},
        {
        'decoder_target_tokens': [8, 9, 9, 9, 9, 4, 1, 0, 0],
         'decoder_input_tokens': [2, 8, 9, 9, 9, 9, 4, 0, 0],
         'decoder_loss_weights': [0, 0, 0, 0, 0, 1, 1, 0, 0],
                   'entity_ids': [0, 41, -1]}]

  The same, packed, with task_feature_lengths = {'inputs': 11, 'targets': 4, 'entity_ids': 4}:

    converted_ds = [{
        'decoder_target_tokens': [7, 9, 9, 5, 3, 1, 8, 9, 9, 9, 9, 4, 1, 0, 0],
         'decoder_input_tokens': [2, 7, 9, 9, 5, 3, 2, 8, 9, 9, 9, 9, 4, 0, 0],
         'decoder_loss_weights': [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0],
          'decoder_segment_ids': [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0, 0],
            'decoder_positions': [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 0, 0],
                   'entity_ids': [40, 0, 41, -1]}]

  A row is as long as inputs and targets together, as in T5X. Padding is 0 whatever the
  vocabulary calls its pad token; where 0 is a real token, loss weights and segment ids tell it
  from padding. Unlike SeqIO's, unpacked decoder inputs do not repeat EOS after the last token.
  An example with empty targets (a prompt to be continued) gets one padding target, as in SeqIO:
  its position reads the last token of the prompt.
  """

  MODEL_FEATURES = int32_features(*model_features.LM_FEATURES)
  PACKING_FEATURE_DTYPES: ClassVar = dict.fromkeys(model_features.LM_PACKED, tf.int32)

  def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """Lengths of the model features: the decoder's is inputs + targets."""
    features = [*self.MODEL_FEATURES, *(self.PACKING_FEATURE_DTYPES if self.pack else ())]
    return model_features.lm_lengths(features, task_feature_lengths)

  def convert_window(
    self, examples: Window, model_feature_lengths: Mapping[str, int]
  ) -> dict[str, tf.Tensor]:
    """Returns the model features of a window, each int32 [rows, its length]."""
    inputs, targets = examples['inputs'], examples['targets']
    # An empty `targets` (a prompt to be continued) becomes one padding target.
    padding = tf.cast(targets.row_lengths() == 0, tf.int64)
    blank = tf.RaggedTensor.from_row_lengths(
      tf.zeros([tf.reduce_sum(padding)], tf.int32), padding, validate=False
    )
    tokens = tf.concat([inputs, targets, blank], axis=1)
    # What a position of the decoder targets is.
    prompt, target = (
      feature.with_values(tf.fill(tf.shape(feature.values), value))
      for feature, value in ((inputs, _PROMPT), (targets, _TARGET))
    )
    role = tf.concat([prompt, target, blank], axis=1)
    length = model_feature_lengths['decoder_target_tokens']
    packed = packing.pack_window(
      {
        'tokens': tokens,
        'role': role,
        'entity_ids': examples['entity_ids'],
      },
      {'tokens': length, 'role': length, 'entity_ids': model_feature_lengths['entity_ids']},
      pack=self.pack,
    )
    tokens, role, segment_ids = packed['tokens'], packed['role'], packed['tokens_segment_ids']
    is_prompt = tf.cast(role == _PROMPT, tf.int32)
    return {
      'decoder_input_tokens': shift_right(tokens, segment_ids, self.bos_id),
      'decoder_target_tokens': tokens,
      'decoder_loss_weights': tf.cast(role == _TARGET, tf.int32),
      # One position more than the prompt: see ItemPrefixLMFeatureConverter.
      'decoder_causal_attention': shift_right(is_prompt, segment_ids, 1),
      'decoder_segment_ids': segment_ids,
      'decoder_positions': packed['tokens_positions'],
      'entity_ids': packed['entity_ids'],
    }


class ItemPrefixLMFeatureConverter(ItemLMFeatureConverter):
  """Prompts with entities for a decoder-only LM whose prompt attends in both directions.

  ItemLMFeatureConverter and one feature more, `decoder_causal_attention`. In spite of its name
  (T5X's) it is 1 where attention is NOT causal: on the prompt, which every position of the
  prompt sees whole, and 0 on what is predicted. It is aligned with the decoder inputs, which
  are shifted right by BOS, so it has one 1 more than the prompt has tokens: the position
  that reads the last token of the prompt, and predicts the first target, belongs to the prompt.

    ds = [{'inputs': [7, 9, 9, 5], 'targets': [3, 1], 'entity_ids': [40]},
          {'inputs': [8, 9, 9, 9, 9], 'targets': [4, 1], 'entity_ids': [0, 41]}]

    task_feature_lengths = {'inputs': 11, 'targets': 4, 'entity_ids': 4}

    converted_ds = [{
        'decoder_target_tokens': [7, 9, 9, 5, 3, 1, 8, 9, 9, 9, 9, 4, 1, 0, 0],
         'decoder_input_tokens': [2, 7, 9, 9, 5, 3, 2, 8, 9, 9, 9, 9, 4, 0, 0],
         'decoder_loss_weights': [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0],
     'decoder_causal_attention': [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
          'decoder_segment_ids': [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0, 0],
            'decoder_positions': [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 0, 0],
                   'entity_ids': [40, 0, 41, -1]}]
  """

  MODEL_FEATURES: ClassVar = {
    **ItemLMFeatureConverter.MODEL_FEATURES,
    **int32_features('decoder_causal_attention'),
  }


class ItemEncDecFeatureConverter(ItemLanguageFeatureConverter):
  """Prompts with entities for an encoder-decoder LM: entities in the encoder, text in both.

  Slot token 9, K = 2, BOS 0 (T5), EOS 1, packed:

    ds = [{'inputs': [7, 9, 9, 5, 1], 'targets': [3, 1], 'entity_ids': [40]},
          {'inputs': [8, 9, 9, 1], 'targets': [4, 6, 1], 'entity_ids': [0]}]

    task_feature_lengths = {'inputs': 10, 'targets': 6, 'entity_ids': 3}

    converted_ds = [{
         'encoder_input_tokens': [7, 9, 9, 5, 1, 8, 9, 9, 1, 0],
          'encoder_segment_ids': [1, 1, 1, 1, 1, 2, 2, 2, 2, 0],
            'encoder_positions': [0, 1, 2, 3, 4, 0, 1, 2, 3, 0],
        'decoder_target_tokens': [3, 1, 4, 6, 1, 0],
         'decoder_input_tokens': [0, 3, 0, 4, 6, 0],
         'decoder_loss_weights': [1, 1, 1, 1, 1, 0],
          'decoder_segment_ids': [1, 1, 2, 2, 2, 0],
            'decoder_positions': [0, 1, 0, 1, 2, 0],
                   'entity_ids': [40, 0, -1]}]

  Without packing every example has a row of its own, and there are no segment ids or positions.
  """

  MODEL_FEATURES = int32_features(*model_features.ENC_DEC_FEATURES)
  PACKING_FEATURE_DTYPES: ClassVar = dict.fromkeys(model_features.ENC_DEC_PACKED, tf.int32)

  def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """Lengths of the model features: the encoder's is inputs, the decoder's is targets."""
    features = [*self.MODEL_FEATURES, *(self.PACKING_FEATURE_DTYPES if self.pack else ())]
    return model_features.enc_dec_lengths(features, task_feature_lengths)

  def convert_window(
    self, examples: Window, model_feature_lengths: Mapping[str, int]
  ) -> dict[str, tf.Tensor]:
    """Returns the model features of a window, each int32 [rows, its length]."""
    packed = packing.pack_window(
      examples,
      {
        'inputs': model_feature_lengths['encoder_input_tokens'],
        'targets': model_feature_lengths['decoder_target_tokens'],
        'entity_ids': model_feature_lengths['entity_ids'],
      },
      pack=self.pack,
    )
    segment_ids = packed['targets_segment_ids']
    return {
      'encoder_input_tokens': packed['inputs'],
      'encoder_segment_ids': packed['inputs_segment_ids'],
      'encoder_positions': packed['inputs_positions'],
      'decoder_input_tokens': shift_right(packed['targets'], segment_ids, self.bos_id),
      'decoder_target_tokens': packed['targets'],
      'decoder_loss_weights': tf.cast(segment_ids > 0, tf.int32),
      'decoder_segment_ids': segment_ids,
      'decoder_positions': packed['targets_positions'],
      'entity_ids': packed['entity_ids'],
    }


class EntityTextFeatureConverter(WindowFeatureConverter):
  """Phase 1: the text of an item (which may be empty) and the entities of the example.

  item_text examples have one entity, the item; pairs have [left, right, user] and often no text.

    ds = [{'targets': [5, 0, 1], 'entity_ids': [40]},
          {'targets': [], 'entity_ids': [41]}]

    task_feature_lengths = {'targets': 5, 'entity_ids': 1}

    converted_ds = [{'text_tokens': [5, 0, 1, 0, 0], 'text_mask': [1, 1, 1, 0, 0],
                      'entity_ids': [40]},
                    {'text_tokens': [0, 0, 0, 0, 0], 'text_mask': [0, 0, 0, 0, 0],
                      'entity_ids': [41]}]

  `text_mask` is 1 on text and 0 on padding: what is attended to, and where a loss on text is
  taken. The tokens alone do not tell, since 0 is a real token in some vocabularies. Not packed.

  Args:
    pack: only False; SeqIO and T5X pass it.
    apply_length_check: whether SeqIO checks every length, before and after.
  """

  TASK_FEATURES = int32_features('targets', 'entity_ids')
  MODEL_FEATURES = int32_features(*model_features.ENTITY_TEXT_FEATURES)

  def __init__(self, *, pack: bool = False, apply_length_check: bool = True):
    if pack:
      raise UsageError('EntityTextFeatureConverter: pack=True; allowed: False.')
    super().__init__(pack=False, apply_length_check=apply_length_check)

  def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """Lengths of the model features, which are those of the task features."""
    return model_features.entity_text_lengths(task_feature_lengths)

  def checks(self, examples: Window) -> list[Check]:
    """No negative entity id."""
    return [negative_entity(examples['entity_ids'])]

  def convert_window(
    self, examples: Window, model_feature_lengths: Mapping[str, int]
  ) -> dict[str, tf.Tensor]:
    """Returns the model features of a window, each int32 [window, its length]."""
    lengths = {
      'targets': model_feature_lengths['text_tokens'],
      'entity_ids': model_feature_lengths['entity_ids'],
    }
    rows = packing.pack_window(examples, lengths, pack=False)
    return {
      'text_tokens': rows['targets'],
      'text_mask': rows['targets_segment_ids'],
      'entity_ids': rows['entity_ids'],
    }

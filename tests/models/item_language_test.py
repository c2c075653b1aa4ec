import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from ilm_jax.models.item_language import Frozen, ItemLanguageModel
from ilm_jax.modules.qformer import QFormerConfig
from ilm_jax.modules.soft_tokens import MlpConfig, SoftTokenConfig
from tests import numpy_decoder, tiny_gemma

SLOT, K, D_CF, NUM_ENTITIES = 9, 2, 6, 12
LM, VARIABLES = tiny_gemma.load('gemma3')
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(NUM_ENTITIES, D_CF)).astype(np.float32)
QFORMER = QFormerConfig(
  num_layers=2, d_model=16, num_heads=2, d_mlp=32, num_queries=K, d_encoder=D_CF
)
KEY = jax.random.key(1)

# Two examples: slots at the beginning and side by side; one entity twice.
ROWS = {
  'decoder_target_tokens': [
    [SLOT, SLOT, 7, SLOT, SLOT, SLOT, SLOT, 3, 4, 1],
    [8, 5, 6, 1] + [0] * 6,
  ],
  'decoder_input_tokens': [
    [2, SLOT, SLOT, 7, SLOT, SLOT, SLOT, SLOT, 3, 4],
    [2, 8, 5, 6] + [0] * 6,
  ],
  'decoder_loss_weights': [[0] * 7 + [1] * 3, [0, 0, 1, 1] + [0] * 6],
  'entity_ids': [[11, 0, 11], [-1, -1, -1]],
}
UNPACKED = {name: np.array(rows, np.int32) for name, rows in ROWS.items()}
PACKED = {
  name: np.concatenate([UNPACKED[name][0], UNPACKED[name][1][:4]])[None] for name in ROWS
} | {
  'decoder_segment_ids': np.array([[1] * 10 + [2] * 4]),
  'decoder_positions': np.array([[*range(10), *range(4)]]),
  'entity_ids': np.array([[11, 0, 11, -1]], np.int32),
}


def make(encoder=QFORMER, **options):
  model = ItemLanguageModel(
    LM, SoftTokenConfig(encoder, LM.config.d_model, gain=0.5), slot_id=SLOT, **options
  )
  frozen = Frozen(VARIABLES['params'], jnp.asarray(VECTORS))
  return model, nn.meta.unbox(model.init(jax.random.key(0))), frozen


def loss(model, params, frozen, batch):
  return model.loss(params, frozen, batch, KEY, deterministic=True)


def oracle(model, params):
  """The loss by loops and by the decoder in NumPy."""
  tensors, _, _ = tiny_gemma.golden('gemma3')
  soft = np.asarray(model.encode(params, jnp.asarray(VECTORS)))
  nll = []
  for inputs, targets, weights, entities in zip(
    *(UNPACKED[f'decoder_{name}'] for name in ('input_tokens', 'target_tokens', 'loss_weights')),
    UNPACKED['entity_ids'],
  ):
    embeddings = numpy_decoder.embed(tensors, LM.config, inputs[None])
    slots = [(entity, k) for entity in entities for k in range(K)]
    for place, (entity, k) in zip(np.flatnonzero(inputs == SLOT), slots):
      embeddings[0, place] = soft[entity, k]
    positions = np.arange(len(inputs))[None]
    sees = numpy_decoder.who_sees_whom(positions, np.ones_like(positions))
    logits = numpy_decoder.logits(tensors, LM.config, embeddings, positions, sees)[0]
    log_p = scipy.special.log_softmax(logits, axis=-1)
    nll += [-log_p[i, targets[i]] for i in np.flatnonzero(weights)]
  return np.mean(nll)


@pytest.mark.parametrize('encoder', [QFORMER, MlpConfig(K, D_CF)], ids=['qformer', 'mlp'])
def test_the_loss_is_the_nll_of_the_targets(encoder):
  model, params, frozen = make(encoder)
  value, metrics = loss(model, params, frozen, UNPACKED)
  np.testing.assert_allclose(value, oracle(model, params), rtol=1e-4)
  assert metrics['target_tokens'] == 5


def test_packed_is_unpacked():
  model, params, frozen = make()
  grad = jax.value_and_grad(lambda p, batch: loss(model, p, frozen, batch)[0])
  (a, a_gradients), (b, b_gradients) = grad(params, UNPACKED), grad(params, PACKED)
  np.testing.assert_allclose(a, b, rtol=1e-5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), a_gradients, b_gradients
  )


def test_logits_of_the_targets_only():
  model, params, frozen = make()
  few, few_params, _ = make(max_targets=3, chunk=2)
  assert jax.tree.all(jax.tree.map(jnp.array_equal, params, few_params))
  value, _ = loss(model, params, frozen, UNPACKED)
  found, metrics = loss(few, params, frozen, UNPACKED)
  np.testing.assert_allclose(found, value, rtol=1e-5)
  assert metrics['targets_left_out'] == 0
  _, metrics = loss(make(max_targets=2)[0], params, frozen, UNPACKED)
  assert metrics['targets_left_out'] == 1


def test_soft_tokens_matter_and_other_entities_do_not():
  model, params, frozen = make()
  value, _ = loss(model, params, frozen, UNPACKED)
  others = frozen.entity_vectors.at[1:11].set(5.0)
  same, _ = loss(model, params, Frozen(frozen.lm, others), UNPACKED)
  assert same == value
  shuffled = {**UNPACKED, 'entity_ids': np.array([[0, 11, 0], [-1] * 3], np.int32)}
  assert abs(loss(model, params, frozen, shuffled)[0] - value) > 1e-3


def test_without_slots_it_is_the_language_model():
  model, params, frozen = make()
  tokens = np.array([[2, 8, 5, 6]])
  batch = {'decoder_input_tokens': tokens, 'entity_ids': np.full((1, 3), -1, np.int32)}
  hidden = model.hidden(params, frozen, batch)
  embeddings = LM.apply(VARIABLES, tokens, method='embed_tokens')
  np.testing.assert_array_equal(hidden, LM.apply(VARIABLES, embeddings)[0])


def test_another_width_is_refused():
  with pytest.raises(ValueError, match='width 7'):
    ItemLanguageModel(LM, SoftTokenConfig(QFORMER, 7), slot_id=SLOT)

import numpy as np

from ilm_jax.data.input.trimming import without_padding


def test_what_is_aligned_is_cut_together_and_nothing_is_lost():
  tokens = np.zeros((2, 100), np.int32)
  tokens[0, :20] = 7
  weights = np.zeros((2, 100), np.int32)
  weights[1, 40] = 1
  entities = np.full((2, 50), -1, np.int32)
  entities[0, :3] = [5, 0, 4]
  batch = {
    'decoder_input_tokens': tokens,
    'decoder_loss_weights': weights,
    'entity_ids': entities,
    'text_tokens': np.zeros((2, 30), np.int32),
    'example_mask': np.array([True, False]),
  }
  cut = without_padding(batch)
  assert cut['decoder_input_tokens'].shape == cut['decoder_loss_weights'].shape == (2, 64)
  assert cut['entity_ids'].shape == (2, 16)
  assert cut['entity_ids'][0, :3].tolist() == [5, 0, 4]
  assert cut['text_tokens'] is batch['text_tokens']
  assert cut['example_mask'] is batch['example_mask']
  for name, x in cut.items():
    if x.ndim == 2:
      pad = -1 if name == 'entity_ids' else 0
      assert (batch[name][:, x.shape[1] :] == pad).all()


def test_a_batch_of_padding():
  cut = without_padding({'entity_ids': np.full((2, 50), -1), 'decoder_x': np.zeros((2, 5))})
  assert cut['entity_ids'].shape == (2, 16)
  assert cut['decoder_x'].shape == (2, 5)
